"""Distances without an index: a padded row of recency, shifted by one place for each query."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.models.embedding import EmbeddingTable


def training_pairs(window: Tensor) -> tuple[Tensor, Tensor]:
    if window.ndim != 2 or window.size(1) < 2:
        raise ValueError("window")
    return window[:, 1:], window[:, :-1] * (window[:, 1:] != 0)


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
        shape = (rows, length, self.heads, self.width)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).split(dim, -1))
        ahead = self.recency.new_full((self.heads, length - 1), -torch.inf)
        line = torch.cat([ahead, self.recency[:, :length]], 1).to(x.dtype)
        bias = line.unfold(1, length, 1).flip(1)  # row i begins i places further left
        itself = torch.eye(length, dtype=torch.bool, device=x.device)
        usable = itself | is_item[:, None, None, :]
        mask = torch.where(usable, bias, -torch.inf)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.movedim(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, *, hidden_dim: int, max_history: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = CausalAttention(dim, num_heads, max_history=max_history)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.rate = dropout

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        looked = self.attention(self.norm1(x), is_item)
        x = x + F.dropout(looked, self.rate, self.training)
        thought = self.down(F.gelu(self.up(self.norm2(x))))
        return x + F.dropout(thought, self.rate, self.training)


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
        self.norm, self.dropout = nn.LayerNorm(self.dim), nn.Dropout(dropout)

    def states(self, history: Tensor) -> Tensor:
        if history.ndim != 2:
            raise ValueError("history")
        history = history[:, : self.most]
        there = history.ne(0)
        x = self.dropout(self.dim**0.5 * self.table(history))
        for block in self.blocks:
            x = block(x, there)
        return F.normalize(self.norm(x), dim=2) * there.unsqueeze(2)

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
        wide = torch.float64 if states.dtype == torch.float64 else torch.float32
        queries = states.to(wide).reshape(-1, states.shape[2]) / temperature
        items = catalogue.to(wide)
        own = target.reshape(-1) - 1
        there = (own >= 0).to(wide)
        if sample is None:
            rows = F.nll_loss(
                F.log_softmax(queries @ items.T, 1), own.clamp(min=0), reduction="none"
            )
        else:
            chosen = torch.cat([own.clamp(min=0)[:, None], sample.expand(len(own), -1)], 1)
            first = torch.einsum("nd,nd->n", queries, items.index_select(0, own.clamp(min=0)))
            scores = torch.cat([first[:, None], queries @ items.index_select(0, sample).T], 1)
            if log_q is not None:
                scores = scores - log_q.to(wide)[chosen]
            hit = chosen == chosen[:, :1]
            hit[:, 0] = False
            rows = -scores.masked_fill(hit, -math.inf).log_softmax(1)[:, 0]
        return (rows * there).sum() / there.sum().clamp(min=1)
