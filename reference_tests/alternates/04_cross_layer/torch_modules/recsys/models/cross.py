"""Built of torch.nn: a layer is an nn.Linear, low rank an nn.Module with two matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CrossLayer(nn.Module):
    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        if dim < 1 or (rank is not None and (rank < 1 or rank > dim)):
            raise ValueError(f"need dim >= 1 and 1 <= rank <= dim, got {dim=} and {rank=}")
        self.low_rank = rank is not None
        shapes = {"u": (dim, rank), "v": (rank, dim)} if self.low_rank else {"weight": (dim, dim)}
        for name, shape in shapes.items():
            matrix = nn.Parameter(torch.empty(shape))
            nn.init.normal_(matrix, std=shape[1] ** -0.5)
            self.register_parameter(name, matrix)
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)))

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if x0.size() != xl.size():
            raise ValueError(f"sizes differ: {x0.size()} and {xl.size()}")
        if self.low_rank:
            return x0 * F.linear(F.linear(xl, self.v), self.u, self.bias) + xl
        return x0 * F.linear(xl, self.weight, self.bias) + xl


class CrossNetwork(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError("num_layers cannot be negative")
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            self.layers.append(CrossLayer(dim, rank=rank))

    def forward(self, x0: Tensor) -> Tensor:
        state = x0.clone()
        for index in range(len(self.layers)):
            state = self.layers[index](x0, state)
        return state
