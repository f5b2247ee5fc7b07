"""Numbers come back as 0-dim tensors; ranks by comparing keys; AUC and NDCG from the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEG = float("-inf")


def _fixed(scores: Tensor) -> Tensor:
    return torch.nan_to_num(scores, nan=NEG, posinf=float("inf"), neginf=NEG)


def _verified(scores: Tensor, relevance: Tensor, k: int | None) -> int:
    if scores.ndim != 2:
        raise ValueError("scores is not a matrix")
    if relevance.shape != scores.shape:
        raise ValueError("relevance is not like scores")
    if k is None:
        return scores.shape[1]
    if k < 1:
        raise ValueError("k is below 1")
    return min(k, scores.shape[1])


def ranked_relevance(scores: Tensor, relevance: Tensor, k: int | None = None) -> Tensor:
    k = _verified(scores, relevance, k)
    # rising by grade from the right: flipped, so that a rising stable sort serves both keys
    grades, order = relevance.double().sort(dim=1, descending=True)
    order = order.gather(1, _fixed(scores).gather(1, order).argsort(dim=1, stable=True))
    return relevance.gather(1, order.flip(1)[:, :k])


def ndcg_at_k(scores: Tensor, relevance: Tensor, k: int, *, gain: str = "linear") -> Tensor:
    if gain not in ("exponential", "linear"):
        raise ValueError(f"gain={gain!r}")
    shown = ranked_relevance(scores, relevance, k).double()
    ideal = ranked_relevance(relevance.double(), relevance, k).double()
    both = torch.stack([shown, ideal])
    if gain == "exponential":
        both = 2.0**both - 1.0
    log = torch.log10(torch.arange(shown.shape[1], device=scores.device, dtype=torch.float64) + 2)
    top, bottom = (both / log).sum(-1)
    return top / bottom


def recall_at_k(scores: Tensor, relevance: Tensor, k: int, *, capped: bool = False) -> Tensor:
    hits = ranked_relevance(scores, relevance, k).sign().double().sum(1) if relevance.dtype != (
        torch.bool
    ) else ranked_relevance(scores, relevance, k).double().sum(1)
    count = torch.count_nonzero(relevance, dim=1).double()
    return hits / (torch.clamp(count, max=k) if capped else count)


def hit_rate_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    return mrr_at_k(scores, relevance, k).ceil()


def mrr_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    relevant = ranked_relevance(scores, relevance, k) != 0
    places = torch.arange(1, relevant.shape[1] + 1, device=scores.device, dtype=torch.float64)
    best = (relevant / places).amax(1)
    return best / (relevance != 0).any(1)  # 0 / 0 where there is nothing to find


def mean_over_users(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.double().nanmean(), (~values.isnan()).sum()


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    ordered = _fixed(scores).sort(dim=1, descending=True).values
    own = torch.take_along_dim(_fixed(scores), target[:, None], 1)
    return torch.searchsorted(-ordered, -own, right=True).squeeze(1)


def full_ranking(score_fn, num_users, *, seen, k, chunk_size=1024):
    if k < 1:
        raise ValueError("k is below 1")
    items, offsets = seen
    pieces = []
    for first in range(0, num_users, chunk_size):
        users = torch.arange(num_users, device=items.device)[first : first + chunk_size]
        scores = _fixed(score_fn(users).to(torch.float32, copy=True))
        begin, end = offsets[first], offsets[first + len(users)]
        position = torch.arange(int(begin), int(end), device=items.device)
        row = torch.searchsorted(offsets, position, right=True) - 1 - first
        scores.view(-1).index_fill_(0, row * scores.shape[1] + items[begin:end], NEG)
        top = torch.topk(scores, min(k, scores.shape[1]), sorted=True)
        pieces.append((top.indices - (top.indices + 1) * (top.values == NEG), top.values))
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def list_metrics(items, scores, target, ks=(10,)):
    for k in ks:
        if not 0 < k <= items.shape[1]:
            raise ValueError(f"no cut at {k} in lists of {items.shape[1]}")
    scores = _fixed(scores)
    mine = torch.where(items == target[:, None], scores, NEG).amax(1)[:, None]
    rank = (scores >= mine).sum(1).double()
    alone = (scores == mine).sum(1) == 1
    found = (mine[:, 0] != NEG) & (alone | (rank != items.shape[1]))
    result = {}
    for k in ks:
        hit = (found & (rank <= k)).double()
        result[f"hit_rate@{k}"] = hit.mean()
        result[f"recall@{k}"] = hit.mean()
        result[f"mrr@{k}"] = (hit / rank).mean()
        result[f"ndcg@{k}"] = (hit / (rank + 1).log2()).mean()
    return result


def auc(scores, labels):
    y = labels.to(torch.float64)
    values, where = _fixed(scores).unique(return_inverse=True)
    pos = torch.zeros(len(values), dtype=torch.float64, device=y.device).index_add(0, where, y)
    neg = torch.zeros_like(pos).index_add(0, where, 1 - y)
    return (pos * (neg.cumsum(0) - neg / 2)).sum() / (pos.sum() * neg.sum())


def normalized_entropy(logits, labels):
    labels = labels.double()
    p = labels.mean()
    constant = torch.logit(p).expand_as(labels)
    loss = nn.BCEWithLogitsLoss()
    if not 0 < p < 1:
        return torch.tensor(float("nan"))
    return loss(logits.double(), labels) / loss(constant, labels)
