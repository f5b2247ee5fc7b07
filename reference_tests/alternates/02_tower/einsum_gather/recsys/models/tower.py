"""Looks all rows up and pools them by einsum under masks, with softplus weights of places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from recsys.models.embedding import EmbeddingTable

WIDTHS = {"id": 1, "multi_hot": 2, "history": 2, "dense": 2, "text": 2}


class Tower(nn.Module):
    KINDS = tuple(WIDTHS)

    def __init__(self, features, dim, *, hidden_dims=(), dropout=0.0, max_history=50, tables=None):
        super().__init__()
        features = list(features)
        if len(features) == 0:
            raise ValueError("no features")
        if len({f.name for f in features}) != len(features):
            raise ValueError("feature names repeat")
        self.specs, self.places = features, max_history
        given = {} if tables is None else tables
        self.embed = nn.ModuleDict()
        self.project = nn.ModuleDict()
        self.decay = nn.ParameterDict()
        for f in features:
            if f.kind not in WIDTHS:
                raise ValueError(f"kind {f.kind} of {f.name} is unknown")
            if f.kind == "dense":
                self.project[f.name] = nn.Linear(f.size, dim)
            elif f.kind == "text":
                self.project[f.name] = nn.Linear(f.size, dim, bias=False)
            else:
                key = f.table or f.name
                if key not in self.embed:
                    self.embed[key] = given[key] if key in given else EmbeddingTable(f.size, dim)
                if tuple(self.embed[key].weight.shape) != (f.size, dim):
                    raise ValueError(f"table {key} is not {f.size} x {dim}")
            if f.kind == "history":
                self.decay[f.name] = nn.Parameter(torch.zeros(max_history, 1))
        widths = [dim * sum(2 if f.kind == "history" else 1 for f in features), *hidden_dims, dim]
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, batch):
        parts = []
        for f in sorted(self.specs, key=lambda f: f.name):
            if f.name not in batch:
                raise KeyError(f.name)
            column = batch[f.name]
            if column.ndim != WIDTHS[f.kind]:
                raise ValueError(f"{f.name} has {column.ndim} dimensions")
            if f.name in self.project:
                if column.size(1) != f.size:
                    raise ValueError(f"{f.name} is {column.size(1)} wide")
                layer = self.project[f.name]
                parts.append(layer(column.to(layer.weight)))
                continue
            table = self.embed[f.table or f.name]
            if f.kind == "id":
                parts.append(table(column))
            elif f.kind == "multi_hot":
                parts.append(self._mean(table(column), (column > 0).to(table.weight)))
            else:
                column = column[:, : self.places]
                weight = F.softplus(self.decay[f.name][: column.size(1), 0])
                rows = table(column)
                parts.append(self._mean(rows, (column > 0) * weight))
                parts.append(rows[:, 0] if column.size(1) else torch.zeros_like(parts[-1]))
        x = self.drop(torch.cat(parts, 1))
        for layer in self.layers[:-1]:
            x = self.drop(torch.relu(layer(x)))
        out = self.layers[-1](x)
        for part in parts:
            out = out + part
        return out / out.square().sum(1, keepdim=True).clamp_min(1e-24).sqrt()

    @staticmethod
    def _mean(rows, weight):
        total = torch.einsum("bl,bld->bd", weight, rows.to(weight.dtype))
        return total / weight.sum(1, keepdim=True).clamp_min(1e-12)


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
        if not temperature > 0:
            raise ValueError("temperature must be positive")
        more = {"hidden_dims": hidden_dims, "dropout": dropout, "max_history": max_history}
        self.user_tower = Tower(user_features, dim, **more)
        self.item_tower = Tower(item_features, dim, tables=dict(self.user_tower.embed), **more)
        self.log_t = nn.Parameter(torch.log(torch.tensor(float(temperature))))

    @property
    def temperature(self):
        return torch.exp(self.log_t)

    def forward(self, user_batch, item_batch):
        return self.user_tower(user_batch), self.item_tower(item_batch)
