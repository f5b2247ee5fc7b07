"""A scalar parameter for each place, sums by bags of mode "sum", the residual as a fixed matrix."""

from __future__ import annotations

import torch
from torch import nn

from recsys.models.embedding import EmbeddingTable


def bag_sum(table, ids, weights=None):
    starts = torch.arange(ids.shape[0], device=ids.device) * ids.shape[1]
    flat = None if weights is None else weights.flatten()
    return table.bag(ids.flatten(), starts.to(ids.dtype), mode="sum", weights=flat)


def ratio(total, count):
    return torch.where(count > 0, total / count.clamp_min(torch.finfo(count.dtype).tiny), 0)


class Normalise(torch.autograd.Function):
    """Rows of length 1, with the derivative written down: take away what points along the row."""

    @staticmethod
    def forward(ctx, x):
        length = x.norm(dim=1, keepdim=True)
        inverse = torch.where(length > 0, 1 / length, 0)
        unit = x * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    def backward(ctx, grad):
        unit, inverse = ctx.saved_tensors
        return (grad - unit * (unit * grad).sum(1, keepdim=True)) * inverse


class Tower(nn.Module):
    KINDS = ("id", "multi_hot", "history", "dense", "text")

    def __init__(self, features, dim, *, hidden_dims=(), dropout=0.0, max_history=50, tables=None):
        super().__init__()
        self.features = sorted(features, key=lambda f: (f.kind, f.name))
        if len(self.features) < 1:
            raise ValueError("give at least one feature")
        names = [f.name for f in self.features]
        if any(names.count(name) > 1 for name in names):
            raise ValueError("names have to be distinct")
        if any(f.kind not in self.KINDS for f in self.features):
            raise ValueError("unknown kind")
        self.table_of = nn.ModuleDict()
        self.affine = nn.ModuleDict()
        self.places = nn.ModuleDict()
        parts = 0
        for f in self.features:
            parts += 1
            if f.kind in ("dense", "text"):
                self.affine[f.name] = nn.Linear(f.size, dim, bias=(f.kind == "dense"))
            else:
                key = f.table or f.name
                if key not in self.table_of:
                    mine = tables[key] if tables and key in tables else EmbeddingTable(f.size, dim)
                    self.table_of[key] = mine
                if self.table_of[key].weight.shape != (f.size, dim):
                    raise ValueError("table of another size")
            if f.kind == "history":
                parts += 1
                scalars = (nn.Parameter(torch.tensor(1 / (1 + i))) for i in range(max_history))
                self.places[f.name] = nn.ParameterList(scalars)
        fold = torch.eye(dim).repeat(parts, 1)
        self.register_buffer("fold", fold, persistent=False)
        mlp = nn.Sequential()
        width = parts * dim
        for i, hidden in enumerate(hidden_dims):
            mlp.add_module(f"drop{i}", nn.Dropout(dropout))
            mlp.add_module(f"linear{i}", nn.Linear(width, hidden))
            mlp.add_module(f"bend{i}", nn.ReLU())
            width = hidden
        mlp.add_module("drop", nn.Dropout(dropout))
        mlp.add_module("linear", nn.Linear(width, dim))
        self.mlp = mlp

    def forward(self, batch):
        parts = []
        for f in self.features:
            if f.name not in batch:
                raise KeyError(f"{f.name}: no such column")
            x = batch[f.name]
            if f.kind == "id" and x.ndim != 1 or f.kind != "id" and x.ndim != 2:
                raise ValueError(f"{f.name}: {tuple(x.shape)}")
            if f.kind in ("dense", "text"):
                if x.size(-1) != f.size:
                    raise ValueError(f"{f.name}: {tuple(x.shape)}")
                parts += [self.affine[f.name](x.type(self.fold.dtype))]
                continue
            table = self.table_of[f.table or f.name]
            if f.kind == "id":
                parts += [table(x)]
                continue
            one = torch.ones((), dtype=self.fold.dtype, device=x.device)
            if f.kind == "multi_hot":
                count = (x != 0).sum(1, keepdim=True) * one
                parts += [ratio(bag_sum(table, x), count)]
                continue
            x = x[:, : len(self.places[f.name])]
            if x.shape[1] == 0:
                x = x.new_zeros(len(x), 1)
            scalars = list(self.places[f.name])[: x.shape[1]]
            weights = torch.stack(scalars).abs().repeat(len(x), 1)
            count = ((x != 0) * weights).sum(1, keepdim=True)
            parts += [ratio(bag_sum(table, x, weights), count), bag_sum(table, x[:, :1])]
        side_by_side = torch.concat(parts, 1)
        return Normalise.apply(side_by_side @ self.fold + self.mlp(side_by_side))


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
        if not temperature > 0.0:
            raise ValueError("temperature has to be above 0")
        common = {"hidden_dims": hidden_dims, "dropout": dropout, "max_history": max_history}
        self.user_tower = Tower(user_features, dim, **common)
        named = {f.table or f.name for f in item_features if f.kind not in ("dense", "text")}
        both = {k: t for k, t in self.user_tower.table_of.items() if k in named}
        self.item_tower = Tower(item_features, dim, tables=both, **common)
        start = torch.tensor([float(temperature)]).log()
        self.register_parameter("log_tau", nn.Parameter(start))

    @property
    def temperature(self):
        return self.log_tau[0].exp()

    def forward(self, user_batch, item_batch):
        return (self.user_tower(user_batch), self.item_tower(item_batch))
