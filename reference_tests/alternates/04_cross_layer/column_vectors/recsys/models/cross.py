"""Column vectors, as DeepCTR-Torch writes it: W @ x with x of shape (..., dim, 1)."""

import math

import torch
from torch import nn


class CrossLayer(nn.Module):
    def __init__(self, dim, *, rank=None):
        super().__init__()
        if dim < 1:
            raise ValueError("dim")
        if rank is not None and rank not in range(1, dim + 1):
            raise ValueError("rank")
        std = 1 / math.sqrt(dim)
        if rank is None:
            self.weight = nn.Parameter(torch.normal(0.0, std, (dim, dim)))
        else:
            self.u = nn.Parameter(torch.normal(0.0, 1 / math.sqrt(rank), (dim, rank)))
            self.v = nn.Parameter(torch.normal(0.0, std, (rank, dim)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x0, xl):
        if x0.shape != xl.shape:
            raise ValueError(f"{x0.shape} is not {xl.shape}")
        first, state = x0.unsqueeze(-1), xl.unsqueeze(-1)
        if hasattr(self, "weight"):
            mixed = self.weight @ state
        else:
            mixed = self.u @ (self.v @ state)
        return (first * (mixed + self.bias.unsqueeze(1)) + state).squeeze(-1)


class CrossNetwork(nn.Module):
    def __init__(self, dim, num_layers, *, rank=None):
        super().__init__()
        if num_layers < 0:
            raise ValueError("num_layers")
        self.layers = nn.Sequential(*[CrossLayer(dim, rank=rank) for _ in range(num_layers)])

    def forward(self, x0):
        states = [x0]
        for layer in self.layers:
            states.append(layer(x0, states[-1]))
        return states[-1]
