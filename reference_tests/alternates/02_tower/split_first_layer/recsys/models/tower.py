"""The first layer of the MLP is a matrix for each part, kinds are a table of functions."""

from __future__ import annotations

import torch
from torch import nn

from recsys.models.embedding import EmbeddingTable

TABLED = {"id": 1, "multi_hot": 2, "history": 2}


class Tower(nn.Module):
    KINDS = (*TABLED, "dense", "text")

    def __init__(self, features, dim, *, hidden_dims=(), dropout=0.0, max_history=50, tables=None):
        super().__init__()
        if not features:
            raise ValueError("features is empty")
        seen = set()
        for f in features:
            if f.name in seen or f.kind not in self.KINDS:
                raise ValueError(f"{f.name} of kind {f.kind}")
            seen.add(f.name)
        self.features = features
        self.max_history = max_history
        self.tables = nn.ModuleDict()
        for f in features:
            if f.kind not in TABLED:
                continue
            key = f.table or f.name
            if key not in self.tables:
                self.tables[key] = (tables or {}).get(key) or EmbeddingTable(f.size, dim)
            have = self.tables[key]
            if (have.num_embeddings, have.embedding_dim) != (f.size, dim):
                raise ValueError(f"table {key}")
        for i, f in enumerate(features):
            if f.kind == "dense":
                self.add_module(f"dense{i}", nn.Linear(f.size, dim))
            elif f.kind == "text":
                self.add_module(f"text{i}", nn.Linear(f.size, dim, bias=False))
            elif f.kind == "history":
                slope = torch.arange(max_history) * (-2.0 / max_history)
                self.register_buffer(f"slope{i}", slope.reshape(1, -1))
                self.register_parameter(f"change{i}", nn.Parameter(torch.zeros(1, max_history)))
        width = hidden_dims[0] if hidden_dims else dim
        count = sum(1 + (f.kind == "history") for f in features)
        self.first = nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(count))
        self.first_bias = nn.Parameter(torch.zeros(width))
        rest = []
        for i, _ in enumerate(hidden_dims):
            out = hidden_dims[i + 1] if i + 1 < len(hidden_dims) else dim
            rest += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dims[i], out)]
        self.rest = nn.Sequential(*rest)
        self.dropout = nn.Dropout(dropout)

    def parts(self, batch):
        for i, f in enumerate(self.features):
            if f.name not in batch:
                raise KeyError(f"{f.name} not in the batch")
            x = batch[f.name]
            if x.ndim != TABLED.get(f.kind, 2):
                raise ValueError(f"{f.name} has shape {tuple(x.shape)}")
            if f.kind not in TABLED:
                if x.shape[1] != f.size:
                    raise ValueError(f"{f.name} has shape {tuple(x.shape)}")
                linear = self.get_submodule(f"{f.kind}{i}")
                yield linear(x.to(linear.weight.dtype))
                continue
            table = self.tables[f.table or f.name]
            if f.kind == "id":
                yield table(x)
                continue
            if f.kind == "history":
                x = x[:, : self.max_history]
            mask = x.ne(0).to(table.weight.dtype)
            if f.kind == "history":
                logits = getattr(self, f"slope{i}") + getattr(self, f"change{i}")
                mask = mask * logits[:, : x.shape[1]].exp()
            shares = mask / (mask.sum(1, keepdim=True) + 1e-30)
            rows = table(x)
            yield torch.bmm(shares[:, None], rows.to(shares.dtype))[:, 0]
            if f.kind == "history":
                yield rows[:, 0] if x.shape[1] else rows.sum(1)

    def forward(self, batch):
        parts = list(self.parts(batch))
        first = self.first_bias
        for part, layer in zip(parts, self.first, strict=True):
            first = first + layer(self.dropout(part))
        out = self.rest(first)
        for part in parts:
            out = out + part
        length = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
        return torch.where(length > 0, out / torch.where(length > 0, length, 1), out)


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
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}")
        super().__init__()
        tables = {}
        sides = []
        for features in (user_features, item_features):
            side = Tower(
                features,
                dim,
                hidden_dims=hidden_dims,
                dropout=dropout,
                max_history=max_history,
                tables=tables,
            )
            tables.update(side.tables.items())
            sides.append(side)
        self.user_tower, self.item_tower = sides
        self.log_temperature = nn.Parameter(torch.tensor(temperature, dtype=torch.float32).log())

    @property
    def temperature(self):
        return torch.exp(self.log_temperature)

    def forward(self, user_batch, item_batch):
        return self.user_tower.forward(user_batch), self.item_tower.forward(item_batch)
