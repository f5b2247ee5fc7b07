"""An encoder module for each feature, nn.Embedding for tables, torch's own losses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.data.features import Feature
from recsys.models.cross import CrossNetwork


class Dense(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.offset = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.offset


class Lookup(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


class MeanOfList(Lookup):
    def forward(self, ids: Tensor) -> Tensor:
        real = ids.ne(self.table.padding_idx)
        total = self.table(ids).sum(dim=1)  # the padding row is zero
        return total / real.sum(dim=1, keepdim=True).clamp(min=1)


class RankingModel(nn.Module):
    def __init__(
        self,
        features: Sequence[Feature],
        *,
        embedding_dim: int = 8,
        num_cross_layers: int = 2,
        rank: int | None = None,
        hidden_dims: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        structure: str = "parallel",
    ) -> None:
        super().__init__()
        if structure not in {"parallel", "stacked"}:
            raise ValueError(f"unknown structure {structure}")
        if len(features) == 0:
            raise ValueError("a ranking model needs features")
        if len({f.name for f in features}) != len(features):
            raise ValueError("two features have the same name")
        self.parallel = structure == "parallel"
        tables: dict[str, nn.Embedding] = {}
        self.names = [f.name for f in features]
        self.encode = nn.ModuleList()
        for f in features:
            if f.kind == "dense":
                self.encode.append(Dense(f.size))
            elif f.kind == "text":
                self.encode.append(nn.Linear(f.size, embedding_dim, bias=False))
            elif f.kind in ("id", "multi_hot", "history"):
                key = f.table or f.name
                if key not in tables:
                    tables[key] = nn.Embedding(f.size, embedding_dim, padding_idx=0)
                if tables[key].num_embeddings != f.size:
                    raise ValueError(f"table {key} cannot have two sizes")
                self.encode.append((Lookup if f.kind == "id" else MeanOfList)(tables[key]))
            else:
                raise ValueError(f"unknown kind {f.kind}")
        width = sum(f.size if f.kind == "dense" else embedding_dim for f in features)
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        widths = [width, *hidden_dims]
        self.deep = nn.Sequential(
            OrderedDict(
                (
                    f"hidden{i}",
                    nn.Sequential(nn.Linear(a, b), nn.Dropout(dropout), nn.ReLU()),
                )
                for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
            )
        )
        self.out_deep = nn.Linear(widths[-1], 1)
        self.out_cross = nn.Linear(width, 1) if self.parallel else None

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        vectors = []
        for name, encode in zip(self.names, self.encode, strict=False):
            try:
                column = batch[name]
            except KeyError:
                raise KeyError(f"missing column: {name}") from None
            vectors.append(encode(column))
        x0 = torch.hstack(vectors)
        if self.out_cross is None:
            return self.out_deep(self.deep(self.cross(x0)))[:, 0]
        return (self.out_cross(self.cross(x0)) + self.out_deep(self.deep(x0)))[:, 0]


def binary_loss(logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    for other in (labels, sample_weight):
        if other is not None and other.shape != logits.shape:
            raise ValueError("logits, labels and sample_weight must have one shape")
    if len(logits) == 0:
        raise ValueError("empty batch")
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    labels = labels.type_as(logits)
    if sample_weight is None:
        return F.binary_cross_entropy_with_logits(logits, labels)
    weight = sample_weight.type_as(logits)
    total = F.binary_cross_entropy_with_logits(logits, labels, weight=weight, reduction="sum")
    weights = weight.sum()
    return torch.where(weights == 0, 0.0, total / torch.where(weights == 0, 1.0, weights))


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape != labels.shape:
        raise ValueError("logits and labels must have one shape")
    if len(logits) == 0:
        raise ValueError("empty batch")
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    there = logits > -torch.inf
    labels = torch.where(there, labels.type_as(logits), 0.0)
    positives = labels.sum(dim=-1, keepdim=True)
    target = labels / torch.where(positives > 0, positives, 1.0)
    # far below the rest of its list, a candidate has no weight in the softmax
    lowest = torch.where(there, logits.detach(), torch.inf).amin(dim=-1, keepdim=True)
    floor = torch.where(lowest == torch.inf, 0.0, lowest) - 1e6
    per_list = F.cross_entropy(torch.where(there, logits, floor), target, reduction="none")
    return per_list.sum() / (positives > 0).sum().clamp(min=1)
