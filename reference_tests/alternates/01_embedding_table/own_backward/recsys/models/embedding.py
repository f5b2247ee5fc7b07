"""Differs by autograd functions with a backward pass written by hand."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


class Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, padding):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = weight.shape, padding
        return weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, weight.shape[1])

    @staticmethod
    def backward(ctx, above):
        (ids,) = ctx.saved_tensors
        wide = torch.promote_types(above.dtype, torch.float32)
        gradient = torch.zeros(ctx.shape, dtype=wide, device=above.device)
        gradient.index_add_(0, ids.reshape(-1), above.reshape(-1, ctx.shape[1]).to(wide))
        if ctx.padding is not None:
            gradient[ctx.padding] = 0
        return gradient.to(above.dtype), None, None


class WeightedSum(torch.autograd.Function):
    """out[b] = sum of shares[i] * rows[i] over the entries of bag b."""

    @staticmethod
    def forward(ctx, rows, shares, bag, num_bags):
        ctx.save_for_backward(rows, shares, bag)
        wide = torch.promote_types(rows.dtype, torch.float32)
        out = torch.zeros(num_bags, rows.shape[1], dtype=wide, device=rows.device)
        return out.index_add_(0, bag, rows.to(wide) * shares[:, None].to(wide)).to(rows.dtype)

    @staticmethod
    def backward(ctx, above):
        rows, shares, bag = ctx.saved_tensors
        up = above[bag]
        to_rows = (up * shares[:, None].to(up.dtype)).to(rows.dtype)
        return to_rows, (up * rows).sum(1).to(shares.dtype), None, None


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
        self.init_std = embedding_dim ** (-1 / 2) if init_std is None else init_std
        self.weight = nn.Parameter(
            torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.copy_(torch.randn_like(self.weight).mul_(self.init_std))
            keep = torch.arange(self.weight.shape[0], device=self.weight.device)
            if self.padding_idx is not None:
                self.weight.mul_((keep != self.padding_idx)[:, None])

    def legal(self, ids):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError("ids must be integers")
        if ids.device.type == "cpu" and ids.numel():
            low, high = ids.aminmax()
            if low < 0 or high >= self.weight.shape[0]:
                raise IndexError(f"ids from {low} to {high} in a table of {len(self.weight)}")
        return ids

    def forward(self, ids):
        return Lookup.apply(self.weight, self.legal(ids), self.padding_idx)

    def bag(self, values, offsets, *, mode="mean", weights=None):
        if offsets.is_floating_point() or offsets.dtype == torch.bool:
            raise TypeError("offsets must be integers")
        if mode not in ("sum", "mean", "max"):
            raise ValueError("mode is sum, mean or max")
        values = self.legal(values)
        if values.dim() != 1 or offsets.dim() != 1:
            raise ValueError("values and offsets have one axis")
        if weights is not None and (mode == "max" or weights.shape != values.shape):
            raise ValueError("weights: one for each value, and none for max")
        if offsets.device.type == "cpu" and len(offsets):
            bounds = [0, *offsets.tolist(), len(values)]
            if bounds[1] != 0 or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
                raise ValueError("offsets start at 0 and rise to the number of values at most")
        num_bags, width = len(offsets), self.weight.shape[1]
        place = torch.arange(len(values), device=values.device, dtype=offsets.dtype)
        bag = torch.bucketize(place, offsets, right=True) - 1
        shares = torch.ones(len(values), device=values.device) if weights is None else weights
        shares = shares.to(torch.promote_types(shares.dtype, self.weight.dtype))
        shares = shares.to(torch.promote_types(shares.dtype, torch.float32))
        real = torch.ones_like(bag, dtype=torch.bool)
        if self.padding_idx is not None:
            real = values != self.padding_idx
        rows = self(values)
        if mode == "max":
            # the entries in order of value, column by column: the last one to be written wins
            order = torch.where(real[:, None], rows.detach(), -torch.inf)
            best = torch.full((num_bags, width), -torch.inf, dtype=rows.dtype, device=rows.device)
            best = best.scatter_reduce(0, bag[:, None].expand(-1, width), order, "amax")
            wins = (order == best[bag]) & real[:, None]
            first = torch.where(wins, place[:, None].long(), len(values))
            winner = torch.full_like(best, len(values), dtype=torch.long)
            winner = winner.scatter_reduce(0, bag[:, None].expand(-1, width), first, "amin")
            padded = torch.cat([rows, rows.new_zeros(1, width)])
            return padded.gather(0, winner)
        shares = torch.where(real, shares, torch.zeros_like(shares))
        if mode == "mean":
            norm = shares.new_zeros(num_bags).index_add(0, bag, shares)[bag]
            shares = shares / torch.where(norm == 0, torch.full_like(norm, torch.inf), norm)
        return WeightedSum.apply(rows, shares, bag, num_bags)


def hash_ids(keys, num_buckets, *, salt=""):
    if num_buckets < 1:
        raise ValueError("num_buckets is at least 1")
    base = hashlib.sha1(salt.encode() + b"/")

    def one(key):
        hasher = base.copy()
        hasher.update(str(key).encode())
        return int(hasher.hexdigest(), 16) % num_buckets

    return torch.LongTensor([one(key) for key in keys])
