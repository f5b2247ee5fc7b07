"""Differs by pooling with a sparse (bags, entries) matrix, and taking maxima from a sort."""

from __future__ import annotations

import binascii
import struct

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
        self.padding_idx = padding_idx
        self.std = init_std
        self.weight = nn.Parameter(
            torch.randn(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self):
        std = self.weight.shape[-1] ** -0.5 if self.std is None else self.std
        mean = torch.zeros((), device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            for row in [self.weight]:
                row.copy_(mean + std * torch.randn_like(row))
            if self.padding_idx is not None:
                self.weight[self.padding_idx, :] = 0

    def forward(self, ids):
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError("integer ids, please")
        return nn.functional.embedding(ids, self.weight, padding_idx=self.padding_idx)

    def bag(self, values, offsets, *, mode="mean", weights=None):
        rows = self(values)
        if offsets.dtype not in (torch.int64, torch.int32):
            raise TypeError("integer offsets, please")
        if values.dim() != 1 or offsets.dim() != 1:
            raise ValueError("one axis, please")
        if mode not in ("sum", "mean", "max"):
            raise ValueError("sum, mean or max, please")
        if weights is not None and mode == "max":
            raise ValueError("no weights with max, please")
        if weights is not None and weights.shape != values.shape:
            raise ValueError("as many weights as values, please")
        if offsets.is_cpu and len(offsets):
            if offsets[0] or offsets[-1] > len(values) or offsets.diff().lt(0).any():
                raise ValueError("offsets from 0 upwards, please")
        n, b = len(values), len(offsets)
        order = torch.arange(n, device=values.device)
        owner = torch.searchsorted(offsets.long(), order, right=True) - 1
        real = torch.ones(n, dtype=torch.bool, device=values.device)
        if self.padding_idx is not None:
            real = values != self.padding_idx
        if n == 0 or b == 0:
            return rows.new_zeros(b, self.weight.shape[1])
        if mode == "max":
            # sorted by value within a bag, the last of the bag is the largest
            low = rows.masked_fill(~real[:, None], -torch.inf)
            rank = low.detach().argsort(dim=0, stable=True)
            bag_rank = owner[rank].argsort(dim=0, stable=True)
            ordered = low.gather(0, rank.gather(0, bag_rank))
            ends = torch.cat([offsets[1:], offsets.new_tensor([n])]).long()
            best = ordered[(ends - 1).clamp(min=0)]
            some = torch.zeros(b, device=values.device).index_add(0, owner, real.float()) > 0
            return best.masked_fill(~some[:, None], 0.0)
        high = torch.promote_types(rows.dtype, torch.float32)
        w = real.to(high) if weights is None else weights.to(high).masked_fill(~real, 0.0)
        if mode == "mean":
            norm = torch.zeros(b, dtype=high, device=values.device).index_add(0, owner, w)
            w = w / norm.masked_fill(norm == 0, torch.inf)[owner]
        scaled = rows.to(high) * w[:, None]
        ones = torch.ones(n, dtype=high, device=values.device)
        matrix = torch.sparse_coo_tensor(torch.stack([owner, order]), ones, (b, n))
        return torch.sparse.mm(matrix, scaled).to(rows.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    """Two crc32 in a row make 64 bits; a multiplication mixes them."""
    if num_buckets < 1:
        raise ValueError("one bucket at least, please")

    def bucket(key):
        data = f"{salt}\n{key}".encode()
        low = binascii.crc32(data)
        high = binascii.crc32(data[::-1], low)
        (number,) = struct.unpack("<Q", struct.pack("<II", low, high))
        number = (number * 0x9E3779B97F4A7C15) & (2**64 - 1)
        number ^= number >> 32
        return (number * 0xD6E8FEB86659FD93 & (2**64 - 1)) % num_buckets

    return torch.tensor([bucket(key) for key in keys], dtype=torch.long)
