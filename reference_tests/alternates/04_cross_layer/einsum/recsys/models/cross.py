"""Everything by einsum, rank kept in the module, parameters made by nn.init."""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=shape[1] ** -0.5))


class CrossLayer(nn.Module):
    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        if not (dim >= 1 and (rank is None or 1 <= rank <= dim)):
            raise ValueError(f"dim={dim}, rank={rank}")
        self.bias = nn.Parameter(torch.zeros(dim))
        if rank is None:
            self.weight = normal(dim, dim)
        else:
            self.v, self.u = normal(rank, dim), normal(dim, rank)
        self.mix = self.full if rank is None else self.low

    def full(self, x: Tensor) -> Tensor:
        return einsum("ij,...j->...i", self.weight, x)

    def low(self, x: Tensor) -> Tensor:
        return einsum("ir,...r->...i", self.u, einsum("rj,...j->...r", self.v, x))

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if tuple(x0.shape) != tuple(xl.shape):
            raise ValueError(f"x0 has shape {x0.shape}, xl has {xl.shape}")
        return xl + x0 * self.mix(xl) + x0 * self.bias


class CrossNetwork(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError(f"num_layers={num_layers}")
        self.layers = nn.ModuleList([CrossLayer(dim, rank=rank) for _ in range(num_layers)])

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.layers:
            x = layer(x0=x0, xl=x)
        return x
