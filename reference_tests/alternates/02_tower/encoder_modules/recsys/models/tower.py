"""A small module for each kind of feature; the MLP starts at zero; a loop over places, sigmoid."""

from __future__ import annotations

import torch
from torch import nn

from recsys.models.embedding import EmbeddingTable


class Encoder(nn.Module):
    """One feature to a list of parts."""

    ndim = 2
    parts = 1

    def __init__(self, feature, dim):
        super().__init__()
        self.name, self.size = feature.name, feature.size

    def check(self, x):
        if x.ndim != self.ndim:
            raise ValueError(f"{self.name}: {x.ndim} dimensions instead of {self.ndim}")
        return x


class Id(Encoder):
    ndim = 1

    def __init__(self, feature, dim, table):
        super().__init__(feature, dim)
        self.table = table

    def forward(self, x):
        return [self.table(self.check(x))]


class MultiHot(Id):
    ndim = 2

    def weights(self, x):
        return x.ne(0).to(self.table.weight.dtype)

    def mean(self, x):
        weights = self.weights(x)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
        pooled = self.table.weight.new_zeros(len(x), self.table.weight.shape[1])
        for place in range(x.shape[1]):  # places are few
            pooled = pooled + weights[:, place, None] * self.table(x[:, place])
        return pooled

    def forward(self, x):
        return [self.mean(self.check(x))]


class History(MultiHot):
    parts = 2

    def __init__(self, feature, dim, table, places):
        super().__init__(feature, dim, table)
        self.place = nn.Embedding(places, 1)

    def weights(self, x):
        return super().weights(x) * torch.sigmoid(self.place.weight[: x.shape[1]]).T

    def forward(self, x):
        x = self.check(x)[:, : self.place.num_embeddings]
        last = x[:, :1].sum(1)  # 0 where there is no column at all
        return [self.mean(x), self.table(last)]


class Vector(Encoder):
    def __init__(self, feature, dim, bias):
        super().__init__(feature, dim)
        self.map = nn.Linear(feature.size, dim, bias=bias)

    def forward(self, x):
        if self.check(x).shape[1] != self.size:
            raise ValueError(f"{self.name}: {x.shape[1]} wide instead of {self.size}")
        return [self.map(x.to(self.map.weight.dtype))]


class Tower(nn.Module):
    KINDS = ("id", "multi_hot", "history", "dense", "text")

    def __init__(self, features, dim, *, hidden_dims=(), dropout=0.0, max_history=50, tables=None):
        super().__init__()
        tables = dict(tables or {})
        names = [f.name for f in features]
        if not names or sorted(set(names)) != sorted(names):
            raise ValueError(f"feature names: {names}")
        self.names = names
        self.encoders = nn.ModuleList()
        for f in features:
            if f.kind in ("dense", "text"):
                self.encoders.append(Vector(f, dim, bias=f.kind == "dense"))
                continue
            if f.kind not in self.KINDS:
                raise ValueError(f"{f.name}: kind {f.kind!r}")
            key = f.table or f.name
            table = tables.setdefault(key, EmbeddingTable(f.size, dim))
            if table.weight.shape != torch.Size([f.size, dim]):
                raise ValueError(f"{f.name}: table {key} of shape {table.weight.shape}")
            if f.kind == "history":
                self.encoders.append(History(f, dim, table, max_history))
            else:
                self.encoders.append((Id if f.kind == "id" else MultiHot)(f, dim, table))
        width = dim * sum(encoder.parts for encoder in self.encoders)
        blocks = []
        for hidden in hidden_dims:
            blocks.append(nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden), nn.ReLU()))
            width = hidden
        last = nn.Linear(width, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.correct = nn.Sequential(*blocks, nn.Dropout(dropout), last)

    def forward(self, batch):
        missing = [name for name in self.names if name not in batch]
        if missing:
            raise KeyError(f"columns {missing}")
        parts = []
        for name, encoder in zip(self.names, self.encoders, strict=True):
            parts.extend(encoder(batch[name]))
        side = torch.hstack(parts)
        out = side.unflatten(1, (len(parts), -1)).sum(1) + self.correct(side)
        return nn.functional.normalize(out)


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
            raise ValueError("temperature above 0, please")
        more = dict(hidden_dims=hidden_dims, dropout=dropout, max_history=max_history)
        self.towers = nn.ModuleDict()
        self.towers["user"] = Tower(user_features, dim, **more)
        known = {}
        for f, encoder in zip(user_features, self.towers["user"].encoders, strict=True):
            if hasattr(encoder, "table"):
                known[f.table or f.name] = encoder.table
        self.towers["item"] = Tower(item_features, dim, tables=known, **more)
        self.register_parameter("tau", nn.Parameter(torch.tensor(temperature * 1.0).log()))

    @property
    def user_tower(self):
        return self.towers["user"]

    @property
    def item_tower(self):
        return self.towers["item"]

    @property
    def temperature(self):
        return self.tau.exp()

    def forward(self, user_batch, item_batch):
        return self.user_tower(user_batch), self.item_tower(item_batch)
