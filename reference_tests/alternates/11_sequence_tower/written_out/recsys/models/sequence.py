"""Softmax, scale and norms written out; the loss by log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.models.embedding import EmbeddingTable


def training_pairs(window: Tensor) -> tuple[Tensor, Tensor]:
    if window.dim() != 2 or window.shape[-1] <= 1:
        raise ValueError(f"not a window: {list(window.shape)}")
    length = window.shape[1] - 1
    history = window.narrow(1, 1, length).clone()
    return history, window.narrow(1, 0, length).masked_fill(history == 0, 0)


class CausalAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, *, max_history: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or max_history < 1 or dim % num_heads != 0:
            raise ValueError("sizes")
        self.heads, self.width = num_heads, dim // num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.recency = nn.Parameter(torch.zeros(num_heads, max_history))

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        rows, length, dim = x.shape
        parts = self.qkv(x).reshape(rows, length, 3, self.heads, self.width)
        scores = torch.einsum("bihd,bjhd->bhij", parts[:, :, 0] / self.width**0.5, parts[:, :, 1])
        place = torch.arange(length, device=x.device)
        back = place[None, :] - place[:, None]
        scores = scores + self.recency[:, back.clamp(min=0)].to(x.dtype)
        hidden = (back < 0) | ((back > 0) & ~is_item[:, None, None, :])
        scores = scores.masked_fill(hidden, -math.inf)
        share = (scores - scores.detach().amax(3, keepdim=True)).exp()
        share = share / share.sum(3, keepdim=True)
        mixed = torch.einsum("bhij,bjhd->bihd", share, parts[:, :, 2])
        return self.out(mixed.reshape(rows, length, dim))


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * spread * self.weight + self.bias


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, *, hidden_dim: int, max_history: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = CausalAttention(dim, num_heads, max_history=max_history)
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.rate = dropout

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        looked = self.attention(self.norm1(x), is_item)
        x = x + F.dropout(looked, self.rate, self.training)
        thought = self.down(_gelu(self.up(self.norm2(x))))
        return x + F.dropout(thought, self.rate, self.training)


def _gelu(x: Tensor) -> Tensor:
    return x * torch.special.ndtr(x)


class SequenceTower(nn.Module):
    def __init__(
        self,
        table: EmbeddingTable,
        *,
        num_blocks: int,
        num_heads: int,
        hidden_dim: int,
        max_history: int,
        dropout: float = 0.0,
        column: str = "history",
    ) -> None:
        super().__init__()
        if num_blocks < 1:
            raise ValueError("num_blocks")
        self.table, self.most, self.column = table, max_history, column
        self.dim = table.weight.shape[1]
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            self.blocks.append(
                Block(
                    self.dim,
                    num_heads,
                    hidden_dim=hidden_dim,
                    max_history=max_history,
                    dropout=dropout,
                )
            )
        self.norm, self.dropout = Norm(self.dim), nn.Dropout(dropout)

    def states(self, history: Tensor) -> Tensor:
        if history.ndim != 2:
            raise ValueError("history")
        history = history[:, : self.most]
        there = history.ne(0)
        x = self.dropout(self.dim**0.5 * self.table(history))
        for block in self.blocks:
            x = block(x, there)
        x = torch.where(there[..., None], self.norm(x), 1.0)
        return x / x.norm(dim=2, keepdim=True).clamp(min=1e-12) * there[..., None]

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        history = batch[self.column]
        if history.ndim != 2:
            raise ValueError("history")
        # one more place of padding changes nothing, and then there is a first one
        return self.states(F.pad(history, (0, 1)))[:, 0]


def _check(states, target, catalogue, temperature, sample, log_q) -> None:
    fits = states.ndim == 3 and states.numel() > 0 and target.shape == states.shape[:2]
    fits = fits and catalogue.ndim == 2 and catalogue.shape[1] == states.shape[2]
    fits = fits and (sample is None or (sample.ndim == 1 and sample.numel() > 0))
    if log_q is not None:
        fits = fits and sample is not None and log_q.shape == catalogue.shape[:1]
    if not fits or (isinstance(temperature, (int, float)) and temperature <= 0):
        raise ValueError("the arguments of next_item_loss do not fit")


def next_item_loss(
    states: Tensor,
    target: Tensor,
    catalogue: Tensor,
    *,
    temperature: float | Tensor,
    sample: Tensor | None = None,
    log_q: Tensor | None = None,
) -> Tensor:
    _check(states, target, catalogue, temperature, sample, log_q)

    with torch.autocast(states.device.type, enabled=False):
        wide = torch.promote_types(states.dtype, torch.float32)
        u, c = states.to(wide).flatten(0, 1) / temperature, catalogue.to(wide)
        there = target.flatten() > 0
        own = torch.where(there, target.flatten() - 1, 0)
        mine = (u * c[own]).sum(1)
        if sample is None:
            rest = torch.logsumexp(u @ c.T, 1)
        else:
            drawn = u @ c[sample].T
            if log_q is not None:
                mine, drawn = mine - log_q[own], drawn - log_q[sample]
            drawn = torch.where(own[:, None] == sample, -torch.inf, drawn)
            rest = torch.logsumexp(torch.cat([drawn, mine[:, None]], 1), 1)
        each = torch.where(there, rest - mine, 0.0)
        return each.sum() / there.sum().clamp(min=1)
