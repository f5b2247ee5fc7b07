"""One matrix for the places of all histories, softmax with padding masked, stacked parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from recsys.models.embedding import EmbeddingTable


class Tower(nn.Module):
    KINDS = ("id", "multi_hot", "history", "dense", "text")

    def __init__(self, features, dim, *, hidden_dims=(), dropout=0.0, max_history=50, tables=None):
        super().__init__()
        self.features, self.dim = tuple(features), dim
        if not self.features:
            raise ValueError("nothing to encode")
        for i, f in enumerate(self.features):
            if f.kind not in Tower.KINDS:
                raise ValueError(f"{f.kind!r} is not one of {Tower.KINDS}")
            if f.name in (g.name for g in self.features[:i]):
                raise ValueError(f"{f.name!r} comes twice")
        histories = [f.name for f in self.features if f.kind == "history"]
        self.row_of = {name: i for i, name in enumerate(histories)}
        if histories:  # one matrix, a row for each history
            self.place_logits = nn.Parameter(torch.randn(len(histories), max_history))
        self.num_places = max_history
        self.lookups = nn.ModuleDict()
        self.maps = nn.ModuleDict()
        for f in self.features:
            if f.kind in ("dense", "text"):
                self.maps[f.name] = nn.Linear(f.size, dim, bias=f.kind != "text")
                continue
            key = f.table or f.name
            if key not in self.lookups:
                use = tables[key] if tables is not None and key in tables else None
                self.lookups[key] = EmbeddingTable(f.size, dim) if use is None else use
            rows, width = self.lookups[key].weight.shape
            if rows != f.size or width != dim:
                raise ValueError(f"table {key!r}: {rows} x {width}, not {f.size} x {dim}")
        self.num_parts = len(self.features) + len(histories)
        sizes = (self.num_parts * dim, *hidden_dims)
        self.hidden = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.out = nn.Linear(sizes[-1], dim)
        self.rate = dropout

    def forward(self, batch):
        columns = [self._column(f, batch) for f in self.features]
        parts = []
        for f, x in zip(self.features, columns, strict=True):
            if f.name in self.maps:
                parts.append(self.maps[f.name](x))
            elif f.kind == "id":
                parts.append(self.lookups[f.table or f.name](x))
            else:
                parts.extend(self._pooled(f, x))
        stacked = torch.stack(parts, dim=1)
        x = F.dropout(stacked.reshape(-1, self.num_parts * self.dim), self.rate, self.training)
        for layer in self.hidden:
            x = F.dropout(layer(x).clamp_min(0), self.rate, self.training)
        out = stacked.sum(dim=1).add(self.out(x))
        return out.div(out.norm(dim=1, keepdim=True).clamp_min(1e-10))

    def _pooled(self, f, x):
        table = self.lookups[f.table or f.name]
        logits = torch.zeros(1, x.shape[1], device=x.device, dtype=table.weight.dtype)
        if f.kind == "history":
            x = x[:, : self.num_places]
            logits = self.place_logits[self.row_of[f.name], : x.shape[1]][None]
        if x.shape[1] == 0:
            nothing = table(x).sum(1)
            return [nothing, nothing] if f.kind == "history" else [nothing]
        padding = x == 0
        shares = logits.expand(x.shape).masked_fill(padding, -1e9).softmax(1)
        shares = shares.masked_fill(padding, 0.0)
        rows = table(x)
        pooled = (shares[..., None] * rows).sum(1)
        return [pooled, rows.select(1, 0)] if f.kind == "history" else [pooled]

    def _column(self, f, batch):
        if f.name not in batch:
            raise KeyError(f"no column for feature {f.name}")
        x = batch[f.name]
        if f.kind == "id":
            if x.dim() != 1:
                raise ValueError(f"{f.name} should be (B,)")
            return x
        if x.dim() != 2 or (f.name in self.maps and x.shape[1] != f.size):
            raise ValueError(f"{f.name} should be (B, ...), not {tuple(x.shape)}")
        return x.to(self.maps[f.name].weight.dtype) if f.name in self.maps else x


class TwoTower(nn.Module):
    def __init__(
        self,
        user_features,
        item_features,
        dim,
        *,
        hidden_dims=(),
        dropout=0.0,
        max_history=50,
        temperature=0.07,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError("temperature")
        args = (dim,)
        kwargs = {"hidden_dims": hidden_dims, "dropout": dropout, "max_history": max_history}
        self.user_tower = Tower(user_features, *args, **kwargs)
        tables = self.user_tower.lookups
        self.item_tower = Tower(item_features, *args, tables=tables, **kwargs)
        self.log_temperature = nn.Parameter(torch.as_tensor(float(temperature)).log_())

    @property
    def temperature(self):
        return self.log_temperature.exp()

    def forward(self, user_batch, item_batch):
        users = self.user_tower(user_batch)
        items = self.item_tower(item_batch)
        return users, items
