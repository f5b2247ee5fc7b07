"""Padding by multiplication with a mask, also of ids; the head is a sum of linear parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.models.cross import CrossNetwork


class Table(nn.Module):
    """Rows of which row 0 is never seen: it is multiplied by 0."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, dim) / dim**0.5)
        with torch.no_grad():
            self.rows[0] = 0

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows) * (ids != 0).unsqueeze(-1)

    def mean(self, ids: Tensor) -> Tensor:
        count = (ids != 0).sum(-1).unsqueeze(-1)
        return torch.where(count > 0, self(ids).sum(-2) / count.clamp(min=1), 0.0)


class Scaled(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.weight).add(self.bias)


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
        match = {"parallel": True, "stacked": False}
        if structure not in match:
            raise ValueError(f"{structure=}")
        self.parallel = match[structure]
        count = len(features)
        if count == 0 or count != len({f.name for f in features}):
            raise ValueError("features: at least one, with distinct names")
        makers = {
            "dense": lambda f: (Scaled(f.size), f.size),
            "text": lambda f: (nn.Linear(f.size, embedding_dim, bias=False), embedding_dim),
            "id": lambda f: (self._table(f, embedding_dim), embedding_dim),
        }
        makers["history"] = makers["multi_hot"] = makers["id"]
        self._tables = nn.ModuleDict()
        self._encoders = nn.ModuleDict()
        self._columns, width = {}, 0
        for f in features:
            if f.kind not in makers:
                raise ValueError(f"no kind {f.kind}")
            encoder, size = makers[f.kind](f)
            self._encoders["feature_" + f.name] = encoder
            self._columns[f.name] = encoder.mean if f.kind in ("history", "multi_hot") else encoder
            width += size
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        self.deep = nn.ModuleList()
        size = width
        for units in hidden_dims:
            self.deep.extend([nn.Linear(size, units), nn.Dropout(dropout)])
            size = units
        self.from_deep = nn.Linear(size, 1)
        if self.parallel:
            self.from_cross = nn.Linear(width, 1, bias=False)

    def _table(self, f, dim: int) -> Table:
        name = "table_" + (f.table or f.name)
        if name not in self._tables:
            self._tables[name] = Table(f.size, dim)
        if len(self._tables[name].rows) != f.size:
            raise ValueError(f"{name}: {len(self._tables[name].rows)} rows are not {f.size}")
        return self._tables[name]

    def forward(self, batch) -> Tensor:
        if not self._columns.keys() <= set(batch):
            raise KeyError(f"missing: {self._columns.keys() - set(batch)}")
        x0 = torch.cat([encode(batch[name]) for name, encode in self._columns.items()], -1)
        crossed = self.cross(x0)
        h = x0 if self.parallel else crossed
        for i, module in enumerate(self.deep):
            h = module(h) if i % 2 else F.relu(module(h))
        logit = self.from_deep(h)
        if self.parallel:
            logit = logit + self.from_cross(crossed)
        return logit.flatten()


def _checked(*tensors: Tensor | None) -> torch.dtype:
    shapes = {x.shape for x in tensors if x is not None}
    if len(shapes) != 1 or 0 in shapes.pop():
        raise ValueError(f"shapes: {[x.shape for x in tensors if x is not None]}")
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


def binary_loss(logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    dtype = _checked(logits, labels, sample_weight)
    # softmax over "no" at 0 and "yes" at z, with the label as a distribution over the two
    pair = torch.stack([torch.zeros_like(logits, dtype=dtype), logits.to(dtype)], -1)
    yes = labels.to(dtype)
    loss = -(torch.stack([1 - yes, yes], -1) * pair.log_softmax(-1)).sum(-1)
    if sample_weight is None:
        return loss.mean()
    weight = sample_weight.to(dtype)
    return weight @ loss / weight.sum().clamp(min=torch.finfo(dtype).tiny)


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    dtype = _checked(logits, labels)
    z = logits.to(dtype)
    there = torch.isneginf(z).logical_not()
    y = labels.to(dtype) * there
    has = y.sum(1, keepdim=True) > 0
    z = torch.where(has, z, torch.zeros_like(z))
    p = torch.where(has, y / torch.where(has, y.sum(1, keepdim=True), 1.0), 0.0)
    margin = z.logsumexp(1, keepdim=True) - torch.where(there, z, 0.0)
    return (p * margin).sum() / has.sum().clamp(min=1)
