"""The bias as one more column of the matrix: a product with the state and a 1 behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossLayer(nn.Module):
    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError("dim < 1")
        if rank is not None and (rank < 1 or dim < rank):
            raise ValueError("rank outside of 1 .. dim")
        self.register_parameter("weight", None)
        self.register_parameter("u", None)
        self.register_parameter("v", None)
        self.bias = nn.Parameter(torch.zeros(dim))
        if rank is None:
            self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        else:
            self.u = nn.Parameter(torch.randn(dim, rank) / rank**0.5)
            self.v = nn.Parameter(torch.randn(rank, dim) / dim**0.5)

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if x0.shape != xl.shape:
            raise ValueError("x0.shape != xl.shape")
        thin, matrix = (xl, self.weight) if self.v is None else (xl @ self.v.T, self.u)
        one = torch.ones_like(thin[..., :1])
        wider = torch.cat([matrix, self.bias.unsqueeze(1)], 1)
        return x0.mul(torch.cat([thin, one], -1) @ wider.T) + xl


class CrossNetwork(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError("num_layers < 0")
        layers = []
        while len(layers) < num_layers:
            layers.append(CrossLayer(dim, rank=rank))
        self.layers = nn.ModuleList(layers)

    def forward(self, x0: Tensor) -> Tensor:
        x = x0 + 0
        for layer in self.layers:
            x = layer(x0, x)
        return x
