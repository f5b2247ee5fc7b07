"""Differs by multiplying a (bags, rows) matrix of weights with the table; hash is FNV-1a, mixed."""

from __future__ import annotations

import torch
from torch import nn

MASK = (1 << 64) - 1


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
        nn.Module.__init__(self)
        if num_embeddings < 1:
            raise ValueError(f"num_embeddings must be positive, got {num_embeddings}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be positive, got {embedding_dim}")
        if padding_idx is not None and padding_idx not in range(num_embeddings):
            raise ValueError(f"padding_idx {padding_idx} is no row of the table")
        if init_std is not None and init_std < 0:
            raise ValueError("init_std must not be negative")
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.zeros(num_embeddings, embedding_dim, **options))
        self.init_std = init_std
        self.padding_idx = padding_idx
        self.reset_parameters()

    def reset_parameters(self):
        std = self.init_std if self.init_std is not None else 1 / self.weight.size(1) ** 0.5
        for i, part in enumerate([self.weight.detach()]):
            part.copy_(torch.normal(torch.zeros_like(part), 1.0) * std)
            if self.padding_idx is not None:
                part[self.padding_idx + i] = 0

    def _check(self, ids):
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int, torch.long):
            raise TypeError("ids are an integer tensor")
        if ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < len(self.weight))).all()):
            raise IndexError("id outside the table")

    def forward(self, ids):
        self._check(ids)
        flat = torch.index_select(self.weight, 0, ids.reshape(-1))
        if self.padding_idx is not None:
            learned = (ids.reshape(-1, 1) != self.padding_idx).to(flat.dtype)
            flat = flat * learned + flat.detach() * (1 - learned)
        return flat.reshape(*ids.shape, self.weight.size(1))

    def bag(self, values, offsets, *, mode="mean", weights=None):
        if offsets.dtype not in (torch.int, torch.long):
            raise TypeError("offsets are integers")
        if values.dtype not in (torch.int, torch.long):
            raise TypeError("values are integers")
        if values.dim() != 1 or offsets.dim() != 1 or mode not in ("sum", "mean", "max"):
            raise ValueError("shape or mode")
        if weights is not None:
            if mode == "max" or list(weights.shape) != list(values.shape):
                raise ValueError("weights")
        if offsets.device.type == "cpu" and offsets.numel():
            fall = offsets.numel() > 1 and bool((offsets.diff() < 0).any())
            if int(offsets[0]) or fall or int(offsets[-1]) > values.numel():
                raise ValueError("offsets")
        self._check(values)
        rows, width = self.weight.shape
        lengths = torch.diff(offsets, append=offsets.new_full((1,), values.numel()))
        owner = torch.repeat_interleave(lengths)
        here = offsets.new_ones(values.shape, dtype=torch.bool)
        if self.padding_idx is not None:
            here = values != self.padding_idx
        if mode == "max":
            out = torch.full((len(offsets), width), -torch.inf, device=values.device)
            out = out.to(self.weight.dtype)
            looked = self(values).masked_fill(~here.unsqueeze(-1), -torch.inf)
            out = out.index_reduce(0, owner, looked, "amax")
            return torch.where(torch.isneginf(out), 0.0, out)
        high = torch.promote_types(self.weight.dtype, torch.float32)
        w = here.to(high) if weights is None else weights.to(high) * here
        matrix = torch.zeros(len(offsets) * rows, dtype=high, device=values.device)
        matrix = matrix.index_add(0, owner * rows + values, w).view(len(offsets), rows)
        pooled = matrix.to(self.weight.dtype) @ self.weight
        if mode == "mean":
            norm = torch.zeros(len(offsets), 1, dtype=high, device=values.device)
            norm = norm.index_add(0, owner, w[:, None])
            none = norm == 0
            pooled = (pooled / norm.masked_fill(none, 1)).masked_fill(none, 0)
        return pooled.to(self.weight.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    if not num_buckets >= 1:
        raise ValueError("num_buckets")
    buckets = []
    for key in keys:
        state = 0xCBF29CE484222325
        for byte in (salt + "\0" + str(key)).encode():
            state = ((state ^ byte) * 0x100000001B3) & MASK
        state = ((state ^ (state >> 33)) * 0xFF51AFD7ED558CCD) & MASK
        state = ((state ^ (state >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
        buckets.append((state ^ (state >> 33)) % num_buckets)
    return torch.tensor(buckets, dtype=torch.int64)
