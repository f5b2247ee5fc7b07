"""Differs by taking rows with weight[ids], and pooling with index_add and scatter_reduce."""

from __future__ import annotations

import zlib

import torch
from torch import nn

INTEGERS = {torch.int32, torch.int64}


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
        self.pad = padding_idx
        self.std = embedding_dim**-0.5 if init_std is None else float(init_std)
        empty = torch.empty((num_embeddings, embedding_dim), device=device, dtype=dtype)
        self.weight = nn.Parameter(empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)
        if self.pad is not None:
            self.weight[self.pad].zero_()

    def rows(self, ids):
        """Looked-up rows, and which of them are no padding."""
        if ids.dtype not in INTEGERS:
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        if ids.device.type == "cpu" and ids.numel():
            if int(ids.min()) < 0 or int(ids.max()) >= self.weight.shape[0]:
                raise IndexError("id out of range")
        rows = self.weight[ids.long()]
        if self.pad is None:
            return rows, torch.ones_like(ids, dtype=torch.bool)
        real = ids != self.pad
        return torch.where(real[..., None], rows, rows.detach()), real

    def forward(self, ids):
        return self.rows(ids)[0]

    def bag(self, values, offsets, *, mode="mean", weights=None):
        if offsets.dtype not in INTEGERS or values.dtype not in INTEGERS:
            raise TypeError("values and offsets must be integers")
        if values.ndim != 1 or offsets.ndim != 1:
            raise ValueError("values and offsets are one-dimensional")
        if mode not in {"sum", "mean", "max"}:
            raise ValueError(f"no such mode: {mode}")
        if weights is not None and (mode == "max" or weights.shape != values.shape):
            raise ValueError("weights do not fit")
        n, b = values.numel(), offsets.numel()
        if offsets.device.type == "cpu" and b:
            ends = torch.cat([offsets, offsets.new_tensor([n])])
            if ends[0] != 0 or (ends.diff() < 0).any():
                raise ValueError("offsets must begin at 0, not fall, and not pass the end")
        rows, real = self.rows(values)
        marks = torch.zeros(n + 1, dtype=torch.long, device=values.device)
        marks.index_add_(0, offsets.long(), torch.ones_like(offsets, dtype=torch.long))
        owner = (marks.cumsum(0) - 1)[:n]
        dim = self.weight.shape[1]
        if mode == "max":
            low = torch.finfo(rows.dtype).min
            rows = rows.masked_fill(~real[:, None], low)
            out = rows.new_full((b, dim), low)
            out = out.scatter_reduce(0, owner[:, None].expand(-1, dim), rows, "amax")
            count = torch.zeros(b, device=rows.device).index_add(0, owner, real.float())
            return torch.where((count > 0)[:, None], out, torch.zeros_like(out))
        acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
        w = real.to(acc) if weights is None else torch.where(real, weights.to(acc), 0.0)
        rows = torch.where(real[:, None], rows, 0.0).to(acc)
        total = torch.zeros(b, dim, device=rows.device, dtype=acc)
        total = total.index_add(0, owner, rows * w[:, None])
        if mode == "mean":
            norm = torch.zeros(b, device=rows.device, dtype=acc).index_add(0, owner, w)
            zero = norm == 0
            total = total / torch.where(zero, 1.0, norm)[:, None]
            total = torch.where(zero[:, None], 0.0, total)
        return total.to(self.weight.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    if num_buckets < 1:
        raise ValueError("at least one bucket")
    start = zlib.crc32(salt.encode("utf-8"))
    buckets = [zlib.crc32(str(key).encode("utf-8"), start) % num_buckets for key in keys]
    return torch.as_tensor(buckets, dtype=torch.long)
