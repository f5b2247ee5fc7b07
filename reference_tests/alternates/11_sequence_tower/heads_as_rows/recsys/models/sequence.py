"""Heads folded into the batch, one baddbmm for the scores; an analytic gradient of the loss."""

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
        parts = self.qkv(x).view(rows, length, 3 * self.heads, self.width).transpose(1, 2)
        q, k, v = (part.reshape(-1, length, self.width) for part in parts.chunk(3, dim=1))
        place = torch.arange(length, device=x.device)
        back = (place - place.unsqueeze(1)).clamp(min=0)
        bias = self.recency.to(x.dtype).index_select(1, back.flatten()).view(1, -1, length, length)
        seen = is_item[:, None, :].expand(rows, length, length).triu(1)
        seen = seen | torch.eye(length, dtype=torch.bool, device=x.device)
        bias = bias.masked_fill(~seen[:, None], -math.inf).view(-1, length, length)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=1 / math.sqrt(self.width))
        mixed = torch.bmm(scores.softmax(2), v).view(rows, self.heads, length, self.width)
        return self.out(mixed.transpose(1, 2).reshape(rows, length, dim))


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


class _SoftmaxOf(torch.autograd.Function):
    """-log softmax(states @ items.T + shift)[own], summed, with its gradient written down."""

    @staticmethod
    def forward(ctx, states, items, shift, own, there):
        scores = states @ items.T
        if shift is not None:
            scores += shift
        chosen = scores.gather(1, own[:, None])[:, 0]
        top = torch.logsumexp(scores, 1)
        share = scores.sub_(top[:, None]).exp_()
        ctx.save_for_backward(states, items, share, own, there)
        return ((top - chosen) * there).sum()

    @staticmethod
    def backward(ctx, grad):
        states, items, share, own, there = ctx.saved_tensors
        weight = (grad * there)[:, None]
        to_states = (share @ items - items[own]) * weight
        to_items = share.T @ (states * weight)
        to_items = to_items.index_add(0, own, -states * weight)
        return to_states, to_items, None, None, None


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
        queries, items = states.to(wide).flatten(0, 1) / temperature, catalogue.to(wide)
        there = (target.flatten() > 0).to(wide)
        own = (target.flatten() - 1).clamp(min=0)
        count = there.sum().clamp(min=1)
        if sample is None:
            return _SoftmaxOf.apply(queries, items, None, own, there) / count
        mine, drawn = (queries * items[own]).sum(1), queries @ items[sample].T
        if log_q is not None:
            mine, drawn = mine - log_q[own], drawn - log_q[sample]
        drawn = drawn - mine[:, None]
        drawn = torch.where(sample == own[:, None], -torch.inf, drawn)
        rows = F.pad(drawn, (1, 0)).logsumexp(1)
        return (rows * there).sum() / count
