"""Lists pooled by einsum with normalised masks; a sum of dot products instead of a last Linear."""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn

from recsys.models.cross import CrossNetwork
from recsys.models.embedding import EmbeddingTable


class RankingModel(nn.Module):
    def __init__(
        self,
        features,
        *,
        embedding_dim: int = 8,
        num_cross_layers: int = 2,
        rank: int | None = None,
        hidden_dims=(64, 32),
        dropout: float = 0.0,
        structure: str = "parallel",
    ) -> None:
        super().__init__()
        if structure not in ["stacked", "parallel"]:
            raise ValueError(f"structure {structure}")
        if len(features) < 1:
            raise ValueError("no features")
        self.specs = {}
        self.part = nn.ModuleDict()
        self.table = nn.ModuleDict()
        self.scale, self.shift = nn.ParameterDict(), nn.ParameterDict()
        width = 0
        for f in features:
            if f.name in self.specs:
                raise ValueError(f"the name {f.name} is taken")
            self.specs[f.name] = f
            if f.kind == "dense":
                self.scale[f.name] = torch.ones(f.size)
                self.shift[f.name] = torch.zeros(f.size)
                width += f.size
            elif f.kind == "text":
                self.part[f.name] = nn.Linear(f.size, embedding_dim, bias=None)
                width += embedding_dim
            elif f.kind in ("id", "history", "multi_hot"):
                name = f.table or f.name
                if name in self.table and self.table[name].weight.shape[0] != f.size:
                    raise ValueError(f"table {name} has another size")
                if name not in self.table:
                    self.table[name] = EmbeddingTable(f.size, embedding_dim)
                width += embedding_dim
            else:
                raise ValueError(f"no such kind: {f.kind}")
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        sizes = [width] + list(hidden_dims)
        self.deep = nn.Sequential()
        for i in range(len(hidden_dims)):
            self.deep.append(nn.Linear(sizes[i], sizes[i + 1]))
            self.deep.append(nn.ReLU())
            self.deep.append(nn.Dropout(p=dropout))
        self.stacked = structure == "stacked"
        self.a = nn.Parameter(torch.randn(sizes[-1]) / sizes[-1] ** 0.5)
        if not self.stacked:
            self.b = nn.Parameter(torch.randn(width) / width**0.5)
        self.c = nn.Parameter(torch.zeros(()))

    def encode(self, f, x: Tensor) -> Tensor:
        if f.kind == "dense":
            return einsum("bd,d->bd", x, self.scale[f.name]) + self.shift[f.name]
        if f.kind == "text":
            return self.part[f.name](x)
        rows = self.table[f.table or f.name](x)
        if f.kind == "id":
            return rows
        share = (x != 0).to(rows.dtype)
        share = share / share.sum(1, keepdim=True).clamp(min=1.0)
        return einsum("bl,bld->bd", share, rows)

    def forward(self, batch) -> Tensor:
        missing = [name for name in self.specs if name not in batch]
        if missing:
            raise KeyError(f"no columns for {missing}")
        x0 = torch.cat([self.encode(f, batch[name]) for name, f in self.specs.items()], dim=1)
        crosses = self.cross(x0)
        if self.stacked:
            return einsum("bd,d->b", self.deep(crosses), self.a) + self.c
        deep = einsum("bd,d->b", self.deep(x0), self.a)
        return deep + einsum("bd,d->b", crosses, self.b) + self.c


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def binary_loss(logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    given = [logits, labels] + ([] if sample_weight is None else [sample_weight])
    if len({tuple(x.shape) for x in given}) > 1 or logits.nelement() == 0:
        raise ValueError(f"bad shapes {[tuple(x.shape) for x in given]}")
    z = wide(logits)
    y = labels.to(z.dtype)
    loss = torch.logaddexp(z, torch.zeros_like(z)) - y * z
    w = torch.ones_like(z) if sample_weight is None else sample_weight.to(z.dtype)
    whole = w.sum()
    share = torch.where(whole == 0, torch.zeros_like(w), w / torch.where(whole == 0, 1.0, whole))
    return einsum("b,b->", share, loss)


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if tuple(logits.shape) != tuple(labels.shape) or logits.nelement() == 0:
        raise ValueError(f"bad shapes {tuple(logits.shape)} and {tuple(labels.shape)}")
    z = wide(logits)
    there = z.isfinite() | (z > 0)
    y = torch.where(there, labels.to(z.dtype), 0.0)
    z = torch.where(there, z, torch.finfo(z.dtype).min / 4)
    top = z.max(dim=1, keepdim=True).values.detach()
    mass = torch.where(there, (z - top).exp(), 0.0).sum(1, keepdim=True)
    log_p = z - top - mass.clamp(min=1e-30).log()
    total = y.sum(1, keepdim=True)
    target = y / torch.where(total > 0, total, 1.0)
    loss = -einsum("bc,bc->", target, torch.where(there, log_p, 0.0))
    return loss / (total > 0).sum().clamp(min=1)
