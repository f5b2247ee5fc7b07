"""One operation a line, no matmul: sums of products over the last axis, and an explicit stack."""

import torch
from torch import nn


class CrossLayer(nn.Module):
    def __init__(self, dim, *, rank=None):
        super().__init__()
        if dim <= 0:
            raise ValueError("dim must be positive")
        self.dim, self.rank = dim, rank
        self.bias = nn.Parameter(torch.zeros(dim))
        if rank is None:
            self.weight = nn.Parameter(torch.randn(dim, dim).div(dim**0.5))
            return
        if rank <= 0 or rank > dim:
            raise ValueError("rank must be between 1 and dim")
        self.u = nn.Parameter(torch.randn(dim, rank).div(rank**0.5))
        self.v = nn.Parameter(torch.randn(rank, dim).div(dim**0.5))

    def forward(self, x0, xl):
        if list(x0.shape) != list(xl.shape):
            raise ValueError("x0 and xl differ in shape")
        if self.rank is None:
            inner = torch.tensordot(xl, self.weight, dims=([-1], [1]))
        else:
            thin = torch.tensordot(xl, self.v, dims=([-1], [1]))
            inner = torch.tensordot(thin, self.u, dims=([-1], [1]))
        inner = torch.add(inner, self.bias)
        cross = torch.mul(x0, inner)
        return torch.add(cross, xl)


class CrossNetwork(nn.Module):
    def __init__(self, dim, num_layers, *, rank=None):
        super().__init__()
        if num_layers < 0:
            raise ValueError("num_layers must not be negative")
        self.layers = nn.ModuleDict(
            {str(i): CrossLayer(dim, rank=rank) for i in range(num_layers)}
        )

    def forward(self, x0):
        def run(state, index):
            if index == len(self.layers):
                return state
            return run(self.layers[str(index)](x0, state), index + 1)

        return run(x0, 0)
