"""Ids looked up as one-hot products of small tables; parameters in one flat list; vmapped lists."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, relu

from recsys.models.cross import CrossNetwork


def counts(ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """How often each real id occurs in each row: (B,) or (B, L) to (B, rows - 1)."""
    found = one_hot(ids, rows).to(dtype)
    return (found if ids.dim() == 1 else found.sum(1))[:, 1:]


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
        if structure not in ("parallel", "stacked"):
            raise ValueError(structure + " is no structure")
        features = list(features)
        if not features or len({f.name for f in features}) < len(features):
            raise ValueError("features need distinct names, and one at least")
        self.plan, rows, width = [], {}, 0
        self.values = nn.ParameterDict()
        for f in features:
            if f.kind == "dense":
                self.values[f"scale/{f.name}"] = torch.ones(f.size)
                self.values[f"shift/{f.name}"] = torch.zeros(f.size)
            elif f.kind == "text":
                self.values[f"text/{f.name}"] = torch.randn(f.size, embedding_dim) / f.size**0.5
            elif f.kind in ("id", "multi_hot", "history"):
                table = f.table if f.table else f.name
                if rows.get(table, f.size) != f.size:
                    raise ValueError(f"{table} has two sizes")
                if table not in rows:
                    start = torch.randn(f.size, embedding_dim) / embedding_dim**0.5
                    start[0] = 0.0
                    self.values[f"table/{table}"] = start
                rows[table] = f.size
            else:
                raise ValueError(f"{f.kind} is no kind")
            width += f.size if f.kind == "dense" else embedding_dim
            self.plan.append((f.name, f.kind, f.table or f.name))
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        wide = [width] + [int(units) for units in hidden_dims]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(wide, wide[1:], strict=False))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(wide[-1] + (structure == "parallel") * width, 1)
        self.structure = structure

    def encode(self, name: str, kind: str, table: str, x: Tensor) -> Tensor:
        if kind == "dense":
            return self.values[f"shift/{name}"] + x * self.values[f"scale/{name}"]
        if kind == "text":
            return x @ self.values[f"text/{name}"]
        rows = self.values[f"table/{table}"]
        found = counts(x, len(rows), rows.dtype)
        return (found / found.sum(1, keepdim=True).clamp(min=1)) @ rows[1:]

    def forward(self, batch) -> Tensor:
        vectors = []
        for name, kind, table in self.plan:
            if name not in batch:
                raise KeyError(name)
            vectors.append(self.encode(name, kind, table, batch[name]))
        x0 = torch.cat(vectors, 1)
        crossed = self.cross(x0)
        h = {"parallel": x0, "stacked": crossed}[self.structure]
        for linear in self.hidden:
            h = self.drop(relu(linear(h)))
        if self.structure == "parallel":
            h = torch.cat([crossed, h], 1)
        return self.head(h).squeeze(1)


def binary_loss(logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    if logits.numel() == 0 or logits.shape != labels.shape:
        raise ValueError("logits and labels need one shape, and one row at least")
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.to(torch.float32)
    loss = binary_cross_entropy_with_logits(z, labels.to(z.dtype), reduction="none")
    if sample_weight is None:
        return torch.mean(loss)
    if sample_weight.shape != logits.shape:
        raise ValueError("sample_weight needs the shape of logits")
    w = sample_weight.to(z.dtype)
    return torch.sum(w * loss) / torch.where(w.any(), w.sum(), torch.ones_like(w.sum()))


def one_list(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one list, and whether it counts."""
    there = z != -torch.inf
    y = torch.where(there, y, 0.0)
    total = y.sum()
    counted = total > 0
    z = torch.where(counted, z, 0.0)
    norm = torch.logsumexp(z, 0)
    rest = torch.where(there & counted, norm - torch.where(there, z, 0.0), 0.0)
    return (y * rest).sum() / torch.where(counted, total, 1.0), counted


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.numel() == 0 or logits.shape != labels.shape:
        raise ValueError("logits and labels need one shape, and one row at least")
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.to(torch.float32)
    losses, counted = torch.vmap(one_list)(z, labels.to(z.dtype))
    return losses.sum() / counted.sum().clamp(min=1)
