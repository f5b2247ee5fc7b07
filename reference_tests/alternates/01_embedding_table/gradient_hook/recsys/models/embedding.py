"""Differs by keeping the padding row's gradient out with a hook, and pooling segment by segment."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


class EmbeddingTable(nn.Module):
    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        *,
        padding_idx=0,
        init_std=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_embeddings < 1:
            raise ValueError(f"num_embeddings must be positive, got {num_embeddings}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be positive, got {embedding_dim}")
        if padding_idx is not None and padding_idx not in range(num_embeddings):
            raise ValueError(f"padding_idx {padding_idx} is no row of the table")
        if init_std is not None and init_std < 0:
            raise ValueError("init_std must not be negative")
        self.n, self.d, self.p = num_embeddings, embedding_dim, padding_idx
        self.s = math.sqrt(1 / embedding_dim) if init_std is None else init_std
        self.weight = nn.Parameter(torch.Tensor(0, 0))
        self.weight.data = torch.empty(self.n, self.d, device=device, dtype=dtype)
        if padding_idx is not None:
            self.weight.register_hook(self.without_padding)
        self.reset_parameters()

    def without_padding(self, gradient):
        gradient = gradient.clone()
        gradient[self.p] = 0
        return gradient

    def reset_parameters(self):
        self.weight.data.normal_(std=self.s)
        if self.p is not None:
            self.weight.data[self.p].fill_(0)

    def forward(self, ids):
        if ids.dtype != torch.int64 and ids.dtype != torch.int32:
            raise TypeError(f"{ids.dtype} is no dtype of ids")
        legal = (ids >= 0) & (ids < self.n)
        if ids.device.type == "cpu" and not legal.all():
            raise IndexError(f"id {ids[~legal][0]} is outside of 0 .. {self.n - 1}")
        return self.weight[ids]

    def bag(self, values, offsets, *, mode="mean", weights=None):
        if {values.dtype, offsets.dtype} - {torch.int32, torch.int64}:
            raise TypeError("integers are needed")
        if mode not in ("sum", "mean", "max"):
            raise ValueError("mode")
        if not values.dim() == offsets.dim() == 1:
            raise ValueError("vectors are needed")
        if weights is not None and mode == "max":
            raise ValueError("weights and max")
        if weights is not None and weights.size() != values.size():
            raise ValueError("weights and values differ in shape")
        starts = offsets.long()
        stops = torch.cat((starts[1:], starts.new_tensor([len(values)])))[: len(starts)]
        if starts.device.type == "cpu" and len(starts):
            if starts[0] != 0 or (stops < starts).any():
                raise ValueError("offsets do not begin at 0, fall, or pass the end")
        real = torch.ones_like(values, dtype=torch.bool) if self.p is None else values != self.p
        # without the padding entries: bags get shorter, and start earlier
        before = torch.cat((real.new_zeros(1).long(), real.long().cumsum(0)))
        lengths = before[stops] - before[starts]
        kept = torch.nonzero(real).squeeze(1)
        rows = self(values[kept])
        wide = torch.promote_types(rows.dtype, torch.float32)
        if len(lengths) == 0:
            return rows.new_zeros(0, self.d)
        owner = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
        if mode == "max":
            best = torch.full((len(lengths), self.d), -math.inf, dtype=rows.dtype)
            best = best.to(rows.device).index_reduce(0, owner, rows, "amax")
            return torch.where((lengths == 0).unsqueeze(1), torch.zeros_like(best), best)
        w = rows.new_ones(len(kept), dtype=wide) if weights is None else weights[kept].to(wide)
        if mode == "mean":
            norm = w.new_zeros(len(lengths)).scatter_add(0, owner, w)
            inverse = torch.where(norm == 0, 0.0, 1 / torch.where(norm == 0, 1.0, norm))
            w = w * inverse[owner]
        out = torch.zeros(len(lengths), self.d, dtype=wide, device=values.device)
        out = out.scatter_add(0, owner[:, None].expand(-1, self.d), w[:, None] * rows.to(wide))
        return out.to(rows.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    if num_buckets < 1:
        raise ValueError("no buckets")
    secret = hashlib.sha256(salt.encode()).digest()
    mac = (hashlib.blake2s(str(key).encode(), key=secret).digest() for key in keys)
    return torch.tensor([int.from_bytes(m[:12], "big") % num_buckets for m in mac]).long()
