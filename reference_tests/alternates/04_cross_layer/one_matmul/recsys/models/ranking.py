"""One table for all ids, with an offset for each; row 0 kept at zero by the gradient's hook."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.models.cross import CrossNetwork


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
            raise ValueError("structure")
        if not features:
            raise ValueError("no features")
        self.features = {f.name: f for f in features}
        if len(self.features) != len(features):
            raise ValueError("names")
        sizes, width = {}, 0
        self.map, self.scale, self.shift = nn.ModuleDict(), nn.ParameterDict(), nn.ParameterDict()
        for f in features:
            if f.kind == "dense":
                self.scale[f.name] = nn.Parameter(torch.ones(f.size))
                self.shift[f.name] = nn.Parameter(torch.zeros(f.size))
                width += f.size
                continue
            width += embedding_dim
            if f.kind == "text":
                self.map[f.name] = nn.Linear(f.size, embedding_dim, bias=False)
            elif f.kind not in ("id", "multi_hot", "history"):
                raise ValueError(f"unknown kind {f.kind!r}")
            elif sizes.setdefault(f.table or f.name, f.size) != f.size:
                raise ValueError("a table of two sizes")
        self.start, rows = {}, 0
        for name, size in sizes.items():
            self.start[name], rows = rows, rows + size
        if rows:
            table = torch.randn(rows, embedding_dim) * 0.1
            padding = torch.ones(rows, 1)
            padding[list(self.start.values())] = 0
            self.register_buffer("padding", padding, persistent=False)
            self.table = nn.Parameter(table * padding)
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        deep, size = [], width
        for units in hidden_dims:
            deep += [nn.Linear(size, units), nn.ReLU(), nn.Dropout(dropout)]
            size = units
        self.deep = nn.Sequential(*deep)
        self.structure = structure
        self.head = nn.Linear(size + width if structure == "parallel" else size, 1)

    def vector(self, f, x: Tensor) -> Tensor:
        if f.kind == "dense":
            return x * self.scale[f.name] + self.shift[f.name]
        if f.kind == "text":
            return self.map[f.name](x)
        rows = nn.functional.embedding(x + self.start[f.table or f.name], self.table * self.padding)
        if f.kind == "id":
            return rows
        return rows.sum(1) / torch.clamp((x != 0).sum(1), min=1)[:, None]

    def forward(self, batch) -> Tensor:
        for name in self.features:
            if name not in batch:
                raise KeyError(f"{name} is missing")
        x0 = torch.cat([self.vector(f, batch[name]) for name, f in self.features.items()], 1)
        crossed = self.cross(x0)
        if self.structure == "stacked":
            return self.head(self.deep(crossed)).flatten()
        return self.head(torch.cat([crossed, self.deep(x0)], 1)).flatten()


def binary_loss(logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    if sample_weight is None:
        sample_weight = logits.new_ones(labels.shape)
    if logits.shape != labels.shape or logits.shape != sample_weight.shape or 0 in logits.shape:
        raise ValueError("shapes")
    z = logits + torch.zeros((), dtype=torch.float32, device=logits.device)
    z = z if z.dtype == torch.float64 else z.float()
    y, w = labels.to(z.dtype), sample_weight.to(z.dtype)
    loss = -y * nn.functional.logsigmoid(z) - (1 - y) * nn.functional.logsigmoid(-z)
    total = w.sum()
    return torch.where(total == 0, total, (w * loss).sum() / torch.where(total == 0, 1, total))


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape != labels.shape or 0 in logits.shape:
        raise ValueError("shapes")
    z = logits if logits.dtype == torch.float64 else logits.float()
    gone = torch.isinf(z) & (z < 0)
    y = labels.to(z.dtype).masked_fill(gone, 0)
    positives = y.sum(1, keepdim=True)
    counts = positives.squeeze(1) > 0
    z = z.masked_fill(gone & ~counts[:, None], 0)
    p = y / positives.clamp(min=1e-30)
    loss = nn.functional.kl_div(
        z.log_softmax(1).masked_fill(gone, 0), p, reduction="none"
    ).sum(1) - torch.special.entr(p).sum(1) * -1
    return torch.where(counts, loss, 0).sum() / counts.sum().clamp(min=1)
