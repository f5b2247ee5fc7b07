"""Always two full stable sorts, natural logarithms, einsum; a dense mask of seen items."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LOWEST = -torch.inf


def clean(scores: Tensor) -> Tensor:
    return torch.where(torch.isnan(scores), torch.full_like(scores, LOWEST), scores)


def positive(k: int) -> None:
    if not k > 0:
        raise ValueError(f"expected k > 0, got {k}")


def ranked_relevance(scores: Tensor, relevance: Tensor, k: int | None = None) -> Tensor:
    if scores.ndim != 2 or relevance.ndim != 2:
        raise ValueError("expected matrices")
    if scores.shape != relevance.shape:
        raise ValueError("expected matrices of one shape")
    if k is not None:
        positive(k)
    relevance, order = relevance.sort(dim=1, stable=True)
    order = clean(scores).gather(1, order).sort(dim=1, descending=True, stable=True).indices
    return relevance.gather(1, order)[:, slice(k)]


def _dcg(grades: Tensor, gain: str) -> Tensor:
    grades = grades.to(torch.float64)
    gains = grades if gain == "linear" else torch.pow(2, grades).sub(1)
    ranks = torch.arange(1, grades.size(1) + 1, device=grades.device, dtype=torch.float64)
    return torch.einsum("un,n->u", gains, ranks.log1p().reciprocal())


def ndcg_at_k(scores: Tensor, relevance: Tensor, k: int, *, gain: str = "linear") -> Tensor:
    if gain != "linear" and gain != "exponential":
        raise ValueError(gain)
    shown = ranked_relevance(scores, relevance, k)
    best = relevance.double().sort(dim=1, descending=True).values[:, :k]
    return _dcg(shown, gain).div(_dcg(best, gain))


def recall_at_k(scores: Tensor, relevance: Tensor, k: int, *, capped: bool = False) -> Tensor:
    found = ranked_relevance(scores, relevance, k).gt(0).double().sum(dim=1)
    total = relevance.gt(0).double().sum(dim=1)
    if capped:
        total = torch.minimum(total, torch.full_like(total, k))
    return found / total


def hit_rate_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    return torch.ceil(recall_at_k(scores, relevance, k))


def mrr_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    shown = ranked_relevance(scores, relevance, k).gt(0)
    rank = torch.arange(1, shown.size(1) + 1, device=shown.device).double().expand_as(shown)
    first = torch.where(shown, rank, torch.inf).amin(dim=1)
    return torch.where(relevance.gt(0).any(dim=1), first.reciprocal(), torch.nan)


def mean_over_users(values: Tensor) -> tuple[float, int]:
    count = int(values.isnan().logical_not().sum())
    return values.double().nanmean().item(), count


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    scores = clean(scores)
    own = torch.take_along_dim(scores, target.unsqueeze(1), dim=1)
    return scores.size(1) - (scores < own).sum(dim=1)


@torch.no_grad()
def full_ranking(
    score_fn: Callable[[Tensor], Tensor],
    num_users: int,
    *,
    seen: tuple[Tensor, Tensor],
    k: int,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    positive(k)
    items, offsets = seen
    owner = torch.bucketize(torch.arange(len(items), device=items.device), offsets[1:], right=True)
    lists = values = None
    for users in torch.arange(num_users, device=items.device).split(chunk_size):
        scores = clean(score_fn(users).to(torch.float32))
        mine = (owner >= users[0]) & (owner <= users[-1])
        hidden = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        hidden.index_put_((owner[mine] - users[0], items[mine]), torch.tensor(True).to(hidden))
        best, which = scores.masked_fill(hidden, LOWEST).sort(dim=1, descending=True)
        best, which = best[:, :k].clone(), which[:, :k]
        if lists is None:
            lists = which.new_empty(num_users, best.size(1))
            values = best.new_empty(num_users, best.size(1))
        lists[users] = torch.where(best == LOWEST, -1, which)
        values[users] = best
    return lists, values


def list_metrics(
    items: Tensor, scores: Tensor, target: Tensor, ks: Sequence[int] = (10,)
) -> dict[str, float]:
    length = items.size(1)
    for k in ks:
        positive(k)
        if k > length:
            raise ValueError(f"cut {k} of lists of {length}")
    scores = clean(scores).double()
    own = torch.where(items == target.unsqueeze(1), scores, LOWEST).amax(dim=1, keepdim=True)
    at_least, level = (scores >= own).sum(dim=1), (scores == own).sum(dim=1)
    lost = (own.squeeze(1) == LOWEST) | ((at_least == length) & (level > 1))
    rank = at_least.double().masked_fill(lost, torch.inf)
    out = {}
    for k in ks:
        inside = torch.where(rank <= k, rank, torch.inf)
        out |= {
            f"recall@{k}": inside.isfinite().double().mean().item(),
            f"hit_rate@{k}": inside.isfinite().double().mean().item(),
            f"mrr@{k}": inside.reciprocal().mean().item(),
            f"ndcg@{k}": (torch.tensor(2.0).double().log() / inside.log1p().cpu()).mean().item(),
        }
    return out


def auc(scores: Tensor, labels: Tensor) -> float:
    ordered, order = clean(scores).sort()
    low = torch.searchsorted(ordered, ordered, right=False)
    high = torch.searchsorted(ordered, ordered, right=True)
    positive = labels.bool()[order]
    p = int(positive.sum())
    n = len(positive) - p
    if p * n == 0:
        return float("nan")
    doubled = (low + high + 1)[positive].sum().item()  # twice the middle rank, in whole numbers
    return (doubled - p * (p + 1)) / (2 * p * n)


def normalized_entropy(logits: Tensor, labels: Tensor) -> float:
    x, y = logits.double(), labels.double()
    loss = -(y * torch.nn.functional.logsigmoid(x) + (1 - y) * torch.nn.functional.logsigmoid(-x))
    base = torch.distributions.Bernoulli(probs=y.mean(), validate_args=False)
    if y.min() == y.max():
        return float("nan")
    return (loss.mean() / base.entropy()).item()
