"""A hand-written autograd function: forward and backward by the formulas, no autograd inside."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Cross(torch.autograd.Function):
    """x0 * (m + b) + xl for a mix m."""

    @staticmethod
    def forward(ctx, x0: Tensor, xl: Tensor, mixed: Tensor, bias: Tensor) -> Tensor:
        inner = mixed + bias
        ctx.save_for_backward(x0, inner)
        return x0 * inner + xl

    @staticmethod
    def backward(ctx, grad: Tensor):
        x0, inner = ctx.saved_tensors
        scaled = grad * x0
        return grad * inner, grad, scaled, scaled.reshape(-1, scaled.shape[-1]).sum(0)


def cross(x0: Tensor, xl: Tensor, matrices: list[Tensor], bias: Tensor) -> Tensor:
    mixed = xl
    for matrix in matrices:
        mixed = mixed @ matrix.T
    return Cross.apply(x0, xl, mixed, bias)


class CrossLayer(nn.Module):
    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        if dim < 1 or rank is not None and not 0 < rank <= dim:
            raise ValueError("dim is at least 1, rank None or from 1 to dim")
        shapes = [("weight", dim, dim)] if rank is None else [("v", rank, dim), ("u", dim, rank)]
        self.order = [name for name, *_ in shapes]
        for name, rows, columns in shapes:
            setattr(self, name, nn.Parameter(torch.randn(rows, columns) * columns**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim))

    def matrices(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.order]

    def forward(self, x0: Tensor, xl: Tensor) -> Tensor:
        if x0.shape != xl.shape:
            raise ValueError("x0 and xl need the same shape")
        return cross(x0, xl, self.matrices(), self.bias)


class CrossNetwork(nn.Module):
    def __init__(self, dim: int, num_layers: int, *, rank: int | None = None) -> None:
        super().__init__()
        if num_layers < 0:
            raise ValueError("num_layers is at least 0")
        self.layers = nn.ModuleList([CrossLayer(dim, rank=rank) for _ in range(num_layers)])

    def forward(self, x0: Tensor) -> Tensor:
        x = x0
        for layer in self.layers:
            x = cross(x0, x, layer.matrices(), layer.bias)
        return x
