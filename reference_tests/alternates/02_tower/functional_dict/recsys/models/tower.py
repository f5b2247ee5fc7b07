"""All numbers in one ParameterDict, layers by F.linear, padding dropped before bags are made."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from recsys.models.embedding import EmbeddingTable


def uniform(*shape):
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Tower(nn.Module):
    KINDS = ("id", "multi_hot", "history", "dense", "text")

    def __init__(self, features, dim, *, hidden_dims=(), dropout=0.0, max_history=50, tables=None):
        super().__init__()
        self.features = {f.name: f for f in features}
        if not features or len(self.features) < len(features):
            raise ValueError("at least one feature, each with a name of its own")
        self.p, self.max_history = dropout, max_history
        self.made = nn.ModuleDict()
        self.theta = nn.ParameterDict()
        wide = 0
        for name, f in self.features.items():
            if f.kind not in self.KINDS:
                raise ValueError(f"no such kind: {f.kind}")
            wide += dim
            if f.kind in ("dense", "text"):
                self.theta[f"map_{name}"] = uniform(dim, f.size)
                if f.kind == "dense":
                    self.theta[f"shift_{name}"] = nn.Parameter(torch.zeros(1, dim))
                continue
            if f.kind == "history":
                wide += dim
                self.theta[f"place_{name}"] = nn.Parameter(torch.full((max_history,), 0.5))
            key = f.table if f.table is not None else name
            if key not in self.made:
                ready = tables.get(key) if tables else None
                self.made[key] = ready if ready is not None else EmbeddingTable(f.size, dim)
            if list(self.made[key].weight.shape) != [f.size, dim]:
                raise ValueError(f"{name}: its table is not ({f.size}, {dim})")
        self.depth = len(hidden_dims) + 1
        for i, width in enumerate([*hidden_dims, dim]):
            self.theta[f"w{i}"] = uniform(width, wide)
            self.theta[f"b{i}"] = nn.Parameter(torch.zeros(width))
            wide = width

    def forward(self, batch):
        parts = []
        for name, f in self.features.items():
            try:
                x = batch[name]
            except KeyError:
                raise KeyError(f"column {name} is missing") from None
            if f.kind in ("dense", "text"):
                w = self.theta[f"map_{name}"]
                if x.dim() != 2 or x.shape[-1] != f.size:
                    raise ValueError(f"{name}: expected (B, {f.size}), got {list(x.shape)}")
                y = x.to(w.dtype) @ w.T
                parts.append(y + self.theta[f"shift_{name}"] if f.kind == "dense" else y)
                continue
            table = self.made[f.table if f.table is not None else name]
            if x.dim() != 1 + (f.kind != "id"):
                raise ValueError(f"{name}: {x.dim()} dimensions")
            if f.kind == "id":
                parts.append(table(x))
            elif f.kind == "multi_hot":
                parts.append(self._bag(table, x))
            else:
                x = x.narrow(1, 0, min(x.shape[1], self.max_history))
                w = self.theta[f"place_{name}"].square()[: x.shape[1]]
                parts.append(self._bag(table, x, w.repeat(x.shape[0], 1)))
                first = F.pad(x, (0, 1))[:, 0]
                parts.append(table(first))
        total = sum(parts[1:], start=parts[0])
        h = torch.cat(parts, dim=-1)
        for i in range(self.depth):
            h = F.dropout(h, self.p, training=self.training)
            h = F.linear(h, self.theta[f"w{i}"], self.theta[f"b{i}"])
            h = F.relu(h) if i + 1 < self.depth else h
        return F.normalize(total + h, dim=-1)

    def _bag(self, table, ids, weights=None):
        real = ids != 0
        lengths = real.sum(1)
        return table.bag(
            ids[real],
            F.pad(lengths.cumsum(0), (1, -1)).to(ids.dtype),
            weights=None if weights is None else weights[real],
        )


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
        if temperature <= 0.0:
            raise ValueError(f"temperature {temperature}")
        tables = {}
        for f in (*user_features, *item_features):
            if f.kind in ("id", "multi_hot", "history"):
                tables.setdefault(f.table or f.name, EmbeddingTable(f.size, dim))

        def build(features):
            return Tower(
                features,
                dim,
                hidden_dims=hidden_dims,
                dropout=dropout,
                max_history=max_history,
                tables=tables,
            )

        self.user_tower, self.item_tower = build(user_features), build(item_features)
        self.sharpness = nn.Parameter(torch.full((1,), math.log(temperature)))

    @property
    def temperature(self):
        return self.sharpness.exp().squeeze()

    def forward(self, user_batch, item_batch):
        return self.user_tower(user_batch), self.item_tower(item_batch)
