"""Differs by laying the bags out as a padded (B, L) matrix of ids and pooling along L."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class EmbeddingTable(nn.Module):
    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = 0,
        init_std: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        sizes_are_bad = min(num_embeddings, embedding_dim) < 1
        padding_is_bad = padding_idx is not None and (
            padding_idx < 0 or padding_idx >= num_embeddings
        )
        if sizes_are_bad or padding_is_bad or (init_std or 0) < 0:
            raise ValueError("bad size, padding row or standard deviation")
        self.config = (num_embeddings, embedding_dim, padding_idx, init_std)
        weight = torch.zeros(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        rows, width, padding, std = self.config
        std = width**-0.5 if std is None else std
        fresh = torch.randn(rows, width, device=self.weight.device, dtype=self.weight.dtype) * std
        if padding is not None:
            fresh[padding] = 0
        self.weight.data.copy_(fresh)

    def forward(self, ids: Tensor) -> Tensor:
        if str(ids.dtype) not in ("torch.int64", "torch.int32"):
            raise TypeError(f"not ids: {ids.dtype}")
        return embedding(ids, self.weight, self.config[2])

    def bag(
        self, values: Tensor, offsets: Tensor, *, mode: str = "mean", weights: Tensor | None = None
    ) -> Tensor:
        if any(x.is_floating_point() or x.dtype == torch.bool for x in (values, offsets)):
            raise TypeError("values and offsets are integers")
        if values.ndim > 1 or offsets.ndim > 1 or not (values.ndim and offsets.ndim):
            raise ValueError("one axis each")
        ends = torch.cat([offsets[1:], torch.full_like(offsets[:1], values.shape[0])])
        lengths = ends - offsets
        if offsets.device.type == "cpu" and len(offsets):
            if bool((lengths < 0).any()) or offsets[0].item() != 0:
                raise ValueError("offsets")
        if mode not in ("max", "mean", "sum"):
            raise ValueError(f"unknown mode {mode}")
        if weights is not None and mode == "max":
            raise ValueError("weights make no sense for max")
        if weights is not None and tuple(weights.shape) != tuple(values.shape):
            raise ValueError("shape of weights")
        longest = int(lengths.max()) if len(lengths) else 0
        if longest == 0:
            return self.weight.new_zeros(len(offsets), self.config[1])
        step = torch.arange(longest, device=values.device)
        there = step < lengths[:, None]
        place = (offsets[:, None] + step).clamp(max=len(values) - 1)
        ids = values[place]
        if self.config[2] is not None:
            there = there & (ids != self.config[2])
        rows = self(ids)
        if mode == "max":
            rows = rows.masked_fill(~there[..., None], -torch.inf)
            best = rows.max(dim=1).values
            return best.masked_fill(~there.any(1, keepdim=True), 0)
        w = torch.ones_like(values) if weights is None else weights
        w = w[place].double().masked_fill(~there, 0)
        if mode == "mean":
            norm = w.sum(1, keepdim=True)
            w = w / norm.masked_fill(norm == 0, torch.inf)
        return torch.einsum("bl,bld->bd", w, rows.double()).to(rows.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    if num_buckets < 1:
        raise ValueError("num_buckets must be 1 or more")

    def bucket(key):
        return random.Random(f"{salt}|{key}").randrange(num_buckets)  # seeds with sha512

    return torch.tensor(list(map(bucket, keys)), dtype=torch.int64)
