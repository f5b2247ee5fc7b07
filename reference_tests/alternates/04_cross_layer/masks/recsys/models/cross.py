"""Two classes behind one: full and low rank as strategies; torch.lerp-free residual by addcmul_."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def _matrix(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns).normal_(0, math.sqrt(1 / columns)))


class CrossLayer(nn.Module):
    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        if dim < 1:
            raise ValueError(f"{dim=}")
        if rank is not None and (rank < 1 or rank > dim):
            raise ValueError(f"{rank=}")
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))
        self.names = ("weight",) if rank is None else ("v", "u")
        if rank is None:
            self.weight = _matrix(dim, dim)
        else:
            self.u, self.v = _matrix(dim, rank), _matrix(rank, dim)

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if x0.shape != xl.shape:
            raise ValueError(f"{x0.shape=} {xl.shape=}")
        mixed = xl
        for name in self.names:
            mixed = torch.matmul(mixed, getattr(self, name).transpose(0, 1))
        return (mixed + self.bias).mul_(x0).add_(xl)  # in place, in a tensor of its own


class CrossNetwork(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError(f"{num_layers=}")
        self.layers = nn.ModuleList(map(lambda _: CrossLayer(dim, rank=rank), range(num_layers)))

    def forward(self, x0: Tensor) -> Tensor:
        out = x0
        for layer in self.layers:
            out = layer.forward(x0, out)
        return out
