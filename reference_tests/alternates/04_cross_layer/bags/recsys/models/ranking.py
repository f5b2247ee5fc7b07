"""nn.EmbeddingBag with lists as 2-D input, ids as lists of one; dense columns joined first."""

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
            raise ValueError(f"structure={structure!r}")
        if not features:
            raise ValueError("features is empty")
        self.kinds: dict[str, list] = {"dense": [], "text": [], "ids": []}
        seen: set[str] = set()
        bags: dict[str, nn.EmbeddingBag] = {}
        for f in features:
            if f.name in seen:
                raise ValueError(f"{f.name} is there twice")
            seen.add(f.name)
            if f.kind in ("dense", "text"):
                self.kinds[f.kind].append(f.name)
                continue
            if f.kind not in ("id", "multi_hot", "history"):
                raise ValueError(f"{f.name} is of kind {f.kind}")
            key = f.table or f.name
            bag = bags.setdefault(
                key, nn.EmbeddingBag(f.size, embedding_dim, mode="mean", padding_idx=0)
            )
            if bag.num_embeddings != f.size:
                raise ValueError(f"{key}: {bag.num_embeddings} or {f.size} rows?")
            self.kinds["ids"].append((f.name, list(bags).index(key)))
        self.bags = nn.ModuleList(bags.values())
        sizes = {f.name: f.size for f in features}
        dense = sum(sizes[name] for name in self.kinds["dense"])
        if dense:
            self.affine = nn.Parameter(torch.stack([torch.ones(dense), torch.zeros(dense)]))
        self.text = nn.ModuleList(
            nn.Linear(sizes[name], embedding_dim, bias=False) for name in self.kinds["text"]
        )
        width = dense + embedding_dim * (len(features) - len(self.kinds["dense"]))
        self.cross = CrossNetwork(width, num_cross_layers, rank=rank)
        self.deep = mlp([width, *hidden_dims], dropout)
        last = hidden_dims[-1] if len(hidden_dims) else width
        self.parallel = structure == "parallel"
        self.logit = nn.Linear(last + width * self.parallel, 1)

    def inputs(self, batch) -> Tensor:
        names = [*self.kinds["dense"], *self.kinds["text"], *(n for n, _ in self.kinds["ids"])]
        for name in names:
            if name not in batch:
                raise KeyError(f"{name!r} is not in the batch")
        parts = []
        if self.kinds["dense"]:
            numbers = torch.cat([batch[name] for name in self.kinds["dense"]], 1)
            parts.append(torch.addcmul(self.affine[1], self.affine[0], numbers))
        for name, linear in zip(self.kinds["text"], self.text, strict=False):
            parts.append(linear(batch[name]))
        for name, index in self.kinds["ids"]:
            ids = batch[name]
            parts.append(self.bags[index](ids if ids.dim() == 2 else ids.unsqueeze(1)))
        return torch.cat(parts, 1)

    def forward(self, batch) -> Tensor:
        x0 = self.inputs(batch)
        crossed = self.cross(x0)
        parts = (self.deep(x0), crossed) if self.parallel else (self.deep(crossed),)
        return self.logit(torch.cat(parts, 1)).view(-1)


def mlp(widths: list[int], dropout: float) -> nn.Module:
    if len(widths) == 1:
        return nn.Identity()
    first = nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(inplace=True), nn.Dropout(dropout))
    return nn.Sequential(first, mlp(widths[1:], dropout))


class StableBinary(torch.autograd.Function):
    """log(1 + exp(z)) - y z, with the gradient sigmoid(z) - y written down."""

    @staticmethod
    def forward(ctx, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(z, y)
        return z.clamp(min=0) + (-z.abs()).exp().log1p() - y * z

    @staticmethod
    def backward(ctx, grad: Tensor):
        z, y = ctx.saved_tensors
        return grad * (z.sigmoid() - y), None


def binary_loss(logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
    if sample_weight is None:
        sample_weight = torch.ones_like(labels)
    if logits.shape != labels.shape or labels.shape != sample_weight.shape or not len(logits):
        raise ValueError(f"{logits.shape}, {labels.shape}, {sample_weight.shape}")
    dtype = torch.promote_types(torch.float32, logits.dtype)
    z, y, w = (x.to(dtype) for x in (logits, labels, sample_weight))
    share = (w / w.sum()).nan_to_num(0.0)
    return (share * StableBinary.apply(z, y)).sum()


class StableListwise(torch.autograd.Function):
    """The mean over lists, with the gradient (softmax - p) / lists written down."""

    @staticmethod
    def forward(ctx, z: Tensor, y: Tensor) -> Tensor:
        y = y * (z != -torch.inf)
        total = y.sum(1, keepdim=True)
        p = (y / total).nan_to_num(0.0)
        lists = (total > 0).sum().clamp(min=1)
        ctx.save_for_backward(((z.softmax(1) - p) * (total > 0)).nan_to_num(0.0) / lists)
        log_p = z.log_softmax(1)
        return -torch.where(p > 0, p * log_p, 0.0).sum() / lists

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.saved_tensors[0], None


def listwise_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape != labels.shape or not len(logits):
        raise ValueError(f"{logits.shape}, {labels.shape}")
    dtype = torch.promote_types(torch.float32, logits.dtype)
    return StableListwise.apply(logits.to(dtype), labels.to(dtype))
