"""Leading axes flattened, one addmm a layer; nn.Linear makes the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossLayer(nn.Linear):
    """An nn.Linear whose output is crossed; low rank in a subclass of its own."""

    def __new__(cls, dim: int, *, rank: int | None = None):
        return super().__new__(cls if rank is None else LowRank)

    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        if dim < 1:
            raise ValueError(f"a width of {dim}")
        super().__init__(dim, dim)
        nn.init.normal_(self.weight, std=dim**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if x0.shape != xl.shape:
            raise ValueError(f"x0 {x0.shape}, xl {xl.shape}")
        rows = xl.flatten(0, -2) if xl.dim() > 1 else xl[None]
        return xl + x0 * torch.addmm(self.bias, rows, self.weight.t()).view(xl.shape)


class LowRank(CrossLayer):
    def __init__(self, dim: int, *, rank: int) -> None:
        if dim < 1 or rank < 1 or rank > dim:
            raise ValueError(f"a rank of {rank} for a width of {dim}")
        nn.Module.__init__(self)
        self.u = nn.Parameter(torch.randn(dim, rank) * rank**-0.5)
        self.v = nn.Parameter(torch.randn(rank, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if x0.shape != xl.shape:
            raise ValueError(f"x0 {x0.shape}, xl {xl.shape}")
        rows = xl.flatten(0, -2) if xl.dim() > 1 else xl[None]
        mixed = torch.addmm(self.bias, rows.mm(self.v.t()), self.u.t())
        return xl + x0 * mixed.view(xl.shape)


class CrossNetwork(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError(f"{num_layers} layers")
        self.layers = nn.ModuleList(CrossLayer(dim, rank=rank) for _ in range(num_layers))

    def forward(self, x0: Tensor) -> Tensor:
        from functools import reduce

        return reduce(lambda state, layer: layer(x0, state), self.layers, x0)
