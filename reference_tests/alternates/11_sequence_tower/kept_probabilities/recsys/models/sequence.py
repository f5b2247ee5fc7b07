"""Windows of two, weights by einsum, a loss with a backward pass of its own that keeps softmax."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.models.embedding import EmbeddingTable


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, wanted, there):
        probability = logits.softmax(-1)
        lse = logits.logsumexp(-1)
        picked = logits.gather(1, wanted[:, None]).squeeze(1)
        ctx.save_for_backward(probability, wanted, there)
        return torch.where(there, lse - picked, torch.zeros_like(lse)).sum()

    @staticmethod
    def backward(ctx, grad):
        probability, wanted, there = ctx.saved_tensors
        made = probability * (there * grad)[:, None]
        made.scatter_add_(1, wanted[:, None], -(there * grad)[:, None].to(made.dtype))
        return (made, None, None)


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, positive, drawn, wanted, sample, there):
        same = wanted[:, None] == sample[None, :]
        drawn = drawn.masked_fill(same, -torch.inf)
        del same
        lse = torch.logaddexp(positive, drawn.logsumexp(-1))
        ctx.save_for_backward(positive, drawn.sub_(lse[:, None]).exp_(), lse, there)
        return torch.where(there, lse - positive, torch.zeros_like(lse)).sum()

    @staticmethod
    def backward(ctx, grad):
        positive, probability, lse, there = ctx.saved_tensors
        weight = there * grad
        return (
            ((positive - lse).exp() - 1) * weight,
            probability * weight[:, None],
            None,
            None,
            None,
        )


def training_pairs(window: Tensor) -> tuple[Tensor, Tensor]:
    if window.dim() != 2 or window.size(1) < 2:
        raise ValueError(f"expected a window of (B, L + 1), L >= 1, got {tuple(window.shape)}")
    pairs = window.unfold(1, 2, 1)
    target, history = pairs.unbind(2)
    return (history.clone(), target * (history > 0).to(window.dtype))


class CausalAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, *, max_history: int) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or max_history < 1:
            raise ValueError(f"sizes must be at least 1: {dim}, {num_heads}, {max_history}")
        if dim % num_heads != 0:
            raise ValueError(f"dim {dim} is no multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.recency = nn.Parameter(torch.zeros(num_heads, max_history))

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        batch, places, dim = x.shape
        heads = self.num_heads
        mixed = self.qkv(x).view(batch, places, 3, heads, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in mixed.unbind(2))
        order = torch.arange(places, device=x.device)
        ago = order.unsqueeze(0) - order.unsqueeze(1)
        itself = ago.eq(0)
        seen = itself | ago.gt(0) & is_item[:, None, None, :]
        scores = torch.einsum("bhid,bhjd->bhij", q * self.head_dim ** (-0.5), k)
        scores = scores + self.recency[:, ago.clamp(min=0)].to(scores.dtype)
        scores = torch.where(seen, scores, scores.new_full((), -torch.inf))
        weights = scores.softmax(-1).to(v.dtype)
        mixed = torch.einsum("bhij,bhjd->bihd", weights, v)
        return self.out(mixed.reshape(batch, places, dim)).to(x.dtype)


class Block(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, *, hidden_dim: int, max_history: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.norm1 = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, num_heads, max_history=max_history)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, is_item: Tensor) -> Tensor:
        for branch in (
            lambda y: self.attention(self.norm1(y), is_item),
            lambda y: self.down(nn.functional.gelu(self.up(self.norm2(y)))),
        ):
            x = x + self.drop(branch(x))
        return x


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
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        dim = table.weight.shape[1]
        self.table = table
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, hidden_dim=hidden_dim, max_history=max_history, dropout=dropout)
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)
        self.max_history = max_history
        self.column = column

    def states(self, history: Tensor) -> Tensor:
        if history.dim() != 2:
            raise ValueError(f"expected a history of (B, L), got {tuple(history.shape)}")
        history = history[:, : self.max_history]
        is_item = history > 0
        x = self.drop(self.table(history) * self.table.weight.shape[1] ** 0.5)
        for block in self.blocks:
            x = block(x, is_item)
        x = self.norm(x)
        length = x.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()
        return torch.where(is_item.unsqueeze(-1), x / length, torch.zeros_like(x))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.column not in batch:
            raise KeyError(f"the batch has no column {self.column!r}")
        states = self.states(batch[self.column])
        if states.shape[1] == 0:
            return states.new_zeros(states.shape[0], states.shape[2])
        return states[:, 0]


def next_item_loss(
    states: Tensor,
    target: Tensor,
    catalogue: Tensor,
    *,
    temperature: float | Tensor,
    sample: Tensor | None = None,
    log_q: Tensor | None = None,
) -> Tensor:
    if states.dim() != 3 or target.shape != states.shape[:2]:
        raise ValueError(
            f"states {tuple(states.shape)} and target {tuple(target.shape)} do not fit"
        )
    if catalogue.dim() != 2 or catalogue.shape[1] != states.shape[2]:
        raise ValueError(f"catalogue {tuple(catalogue.shape)} does not fit {tuple(states.shape)}")
    if sample is None and log_q is not None:
        raise ValueError("log_q without a sample")
    if sample is not None and (sample.dim() != 1 or sample.numel() == 0):
        raise ValueError(f"expected a sample of (S,), S >= 1, got {tuple(sample.shape)}")
    if log_q is not None and log_q.shape != catalogue.shape[:1]:
        raise ValueError(f"expected log_q of ({len(catalogue)},), got {tuple(log_q.shape)}")
    if not isinstance(temperature, Tensor) and (not temperature > 0):
        raise ValueError(f"temperature must be above 0, got {temperature}")
    with torch.autocast(states.device.type, enabled=False):
        dtype = torch.promote_types(
            torch.promote_types(states.dtype, catalogue.dtype), torch.float32
        )
        users = states.reshape(-1, states.shape[-1]).to(dtype)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(dtype)
        users = users / temperature
        items = catalogue.to(dtype)
        target = target.reshape(-1)
        there = target > 0
        wanted = (target - 1).clamp(min=0).long()
        count = there.sum().clamp(min=1)
        if sample is None:
            logits = users @ items.T
            return _Nll.apply(logits, wanted, there) / count
        rows = items[sample]
        positive = (users * items[wanted]).sum(-1)
        if log_q is not None:
            log_q = log_q.to(dtype)
            positive = positive - log_q[wanted]
            drawn = torch.addmm(-log_q[sample].unsqueeze(0), users, rows.T)
        else:
            drawn = users @ rows.T
        return _Sampled.apply(positive, drawn, wanted, sample, there) / count
