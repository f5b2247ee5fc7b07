"""Differs by being an nn.Embedding, and by normalising a weighted mean after its sum."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import nn


class EmbeddingTable(nn.Embedding):
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
        if num_embeddings < 1:
            raise ValueError(f"num_embeddings must be positive, got {num_embeddings}")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim must be positive, got {embedding_dim}")
        if padding_idx is not None and padding_idx not in range(num_embeddings):
            raise ValueError(f"padding_idx {padding_idx} is no row of the table")
        if init_std is not None and init_std < 0:
            raise ValueError("init_std must not be negative")
        self.__dict__["init_std"] = embedding_dim**-0.5 if init_std is None else init_std
        super().__init__(
            num_embeddings, embedding_dim, padding_idx=padding_idx, device=device, dtype=dtype
        )

    def reset_parameters(self):
        nn.init.normal_(self.weight, 0.0, self.init_std)
        self._fill_padding_idx_with_zero()

    def forward(self, ids):
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids of dtype {ids.dtype}")
        return super().forward(ids)

    def bag(self, values, offsets, *, mode="mean", weights=None):
        for tensor in (values, offsets):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"expected integers, got {tensor.dtype}")
            if tensor.dim() != 1:
                raise ValueError("expected one axis")
        if mode not in ("sum", "mean", "max"):
            raise ValueError(mode)
        if offsets.device.type == "cpu" and len(offsets):
            starts = offsets.tolist()
            if starts[0] != 0 or starts != sorted(starts) or starts[-1] > len(values):
                raise ValueError(f"bad offsets {starts[:10]}")
        if len(offsets) == 0:
            return self.weight[:0]
        if weights is None:
            return F.embedding_bag(
                values, self.weight, offsets, mode=mode, padding_idx=self.padding_idx
            )
        if mode == "max":
            raise ValueError("no weights for max")
        if weights.shape != values.shape:
            raise ValueError("weights must be as many as values")
        given = weights
        weights = weights.to(self.weight.dtype)
        total = F.embedding_bag(
            values,
            self.weight,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            padding_idx=self.padding_idx,
        )
        if mode == "sum":
            return total
        # the sum of the weights is a bag, too: of a table with the single number 1
        wide = given.double()
        if self.padding_idx is not None:
            wide = wide * (values != self.padding_idx)
        one = torch.ones(1, 1, dtype=torch.float64, device=values.device)
        norm = F.embedding_bag(
            torch.zeros_like(values), one, offsets, mode="sum", per_sample_weights=wide
        )
        safe = torch.where(norm == 0, torch.ones_like(norm), norm)
        return (total.double() / safe * (norm != 0)).to(self.weight.dtype)


def hash_ids(keys, num_buckets, *, salt=""):
    if num_buckets <= 0:
        raise ValueError(f"num_buckets={num_buckets}")
    out = torch.empty(len(keys), dtype=torch.int64)
    for place, key in enumerate(keys):
        digest = hashlib.md5(f"{len(salt)}:{salt}:{key}".encode()).hexdigest()
        out[place] = int(digest, 16) % num_buckets
    return out
