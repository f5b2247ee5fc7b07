"""Differs by a mask of real rows in a buffer, and by where in place of multiplication."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

POOLS = dict.fromkeys(["sum", "mean", "max"])


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
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        real = torch.ones(num_embeddings, dtype=torch.bool, device=device)
        if padding_idx is not None:
            real[padding_idx] = False
        self.register_buffer("real", real, persistent=False)
        self.std = 1 / embedding_dim**0.5 if init_std is None else init_std
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        self.weight.normal_().mul_(self.std).mul_(self.real.unsqueeze(1))

    def forward(self, ids):
        self.check("ids", ids)
        rows = self.weight.index_select(0, ids.flatten()).unflatten(0, ids.shape or (1,))
        rows = rows if ids.shape else rows.squeeze(0)
        learned = self.real[ids].unsqueeze(-1).expand_as(rows)
        return rows.where(learned, rows.detach())

    def check(self, name, ids):
        if ids.dtype not in {torch.int32, torch.int64}:
            raise TypeError(f"{name}: {ids.dtype} is no integer of 32 or 64 bits")
        if ids.is_cpu and name != "offsets" and ids.numel():
            if not 0 <= ids.min().item() <= ids.max().item() < len(self.weight):
                raise IndexError(f"{name} outside of 0 .. {len(self.weight) - 1}")

    def bag(self, values, offsets, *, mode="mean", weights=None):
        self.check("offsets", offsets)
        self.check("values", values)
        if mode not in POOLS:
            raise ValueError(f"{mode!r} is none of {', '.join(POOLS)}")
        if (values.ndim, offsets.ndim) != (1, 1):
            raise ValueError("values and offsets need one axis each")
        if weights is not None and (mode == "max" or weights.shape != values.shape):
            raise ValueError("weights do not fit values or mode")
        lengths = torch.diff(torch.cat([offsets, offsets.new_tensor([len(values)])]))
        if offsets.is_cpu and len(offsets) and (lengths.min() < 0 or offsets[0] != 0):
            raise ValueError("offsets are not the starts of bags")
        high = torch.promote_types(self.weight.dtype, torch.float32)
        zeros = torch.zeros(len(offsets), self.weight.shape[1], device=values.device, dtype=high)
        if len(values) == 0 or len(offsets) == 0:
            return zeros.to(self.weight.dtype)

        step = torch.arange(int(lengths.max()), device=values.device).unsqueeze(1)
        index = (offsets + step).clamp(max=len(values) - 1)  # places by bags
        ids = values[index]
        there = self.real[ids] & (step < lengths)
        rows = self(ids).to(high).where(there.unsqueeze(2), 0.0)
        if mode == "max":
            best = rows.where(there.unsqueeze(2), -torch.inf).max(0).values
            return best.where(best > -torch.inf, 0.0).to(self.weight.dtype)
        w = torch.ones_like(ids, dtype=high) if weights is None else weights[index].to(high)
        w = w.where(there, 0.0).unsqueeze(2)
        total = (rows * w).sum(0)
        if mode == "mean":
            norm = w.sum(0)
            none = norm == 0
            total = (total / norm.masked_fill(none, 1.0)).masked_fill(none, 0.0)
        return total.to(self.weight.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    if num_buckets < 1:
        raise ValueError(f"{num_buckets} buckets")
    texts = [repr((salt, str(key))).encode() for key in keys]
    numbers = [int.from_bytes(hashlib.sha3_256(text).digest(), "big") for text in texts]
    return torch.tensor([number % num_buckets for number in numbers], dtype=torch.int64)
