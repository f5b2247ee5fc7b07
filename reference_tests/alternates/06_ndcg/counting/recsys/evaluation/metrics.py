"""Every item gets a rank from a key of score and grade; metrics are summed over the items."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _table(scores: Tensor, relevance: Tensor, k: int | None) -> tuple[Tensor, Tensor, int]:
    if scores.dim() != 2 or relevance.dim() != 2 or scores.shape != relevance.shape:
        raise ValueError(f"{list(scores.shape)} against {list(relevance.shape)}")
    if k is not None and k <= 0:
        raise ValueError(f"k = {k}")
    width = scores.shape[1]
    scores = torch.nan_to_num(scores, -math.inf, math.inf, -math.inf)
    return scores, relevance, min(k or width, width)


def _ranks(scores: Tensor, relevance: Tensor) -> Tensor:
    """The place of every item, from 1: a key of two parts is ranked twice."""
    groups = scores.unique(return_inverse=True)[1]
    grades = relevance.double().unique(return_inverse=True)[1]
    key = groups * (int(grades.max()) + 1 if grades.numel() else 1) + (grades.max() - grades)
    order = key.argsort(dim=1, descending=True)
    place = torch.arange(1, key.shape[1] + 1, device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def ranked_relevance(scores: Tensor, relevance: Tensor, k: int | None = None) -> Tensor:
    scores, relevance, k = _table(scores, relevance, k)
    out = torch.empty_like(relevance)
    return out.scatter_(1, _ranks(scores, relevance) - 1, relevance)[:, :k]


def ndcg_at_k(scores: Tensor, relevance: Tensor, k: int, *, gain: str = "linear") -> Tensor:
    scores, relevance, k = _table(scores, relevance, k)
    if gain == "linear":
        gains = relevance.double()
    elif gain == "exponential":
        gains = torch.expm1(relevance.double() * math.log(2))
    else:
        raise ValueError(gain)

    def dcg(by: Tensor) -> Tensor:
        rank = _ranks(by, relevance)
        return (gains / (rank + 1).double().log2() * (rank <= k)).sum(1)

    return dcg(scores) / dcg(relevance.double())


def _worst(scores: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    scores, relevance, _ = _table(scores, relevance, k)
    relevant = relevance > 0
    return _ranks(scores, relevance), relevant, relevant.sum(1)


def recall_at_k(scores: Tensor, relevance: Tensor, k: int, *, capped: bool = False) -> Tensor:
    rank, relevant, count = _worst(scores, relevance, k)
    found = ((rank <= k) & relevant).sum(1)
    return found.double() / (count.clamp_max(k) if capped else count).double()


def hit_rate_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    rank, relevant, count = _worst(scores, relevance, k)
    hit = ((rank <= k) & relevant).any(1)
    return torch.where(count > 0, hit.double(), math.nan)


def mrr_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    rank, relevant, count = _worst(scores, relevance, k)
    value = (relevant & (rank <= k)).double() / rank.double()
    return torch.where(count > 0, value.max(1).values, math.nan)


def mean_over_users(values: Tensor) -> tuple[float, int]:
    missing = values != values
    count = values.numel() - int(missing.sum())
    total = float(torch.where(missing, 0, values).double().sum())
    return (total / count if count else math.nan), count


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    scores = torch.nan_to_num(scores, -math.inf, math.inf, -math.inf)
    rows = torch.arange(len(scores), device=scores.device)
    own = scores[rows, target]
    below = torch.searchsorted(scores.sort(1).values, own[:, None])[:, 0]
    return scores.shape[1] - below


def full_ranking(score_fn, num_users, *, seen, k, chunk_size=1024):
    if k < 1:
        raise ValueError("an empty list")
    flat, offsets = seen
    lists, values = [], []
    first = 0
    while first < num_users:
        last = min(num_users, first + chunk_size)
        scores = score_fn(torch.arange(first, last, device=flat.device)).to(torch.float32)
        known = flat[offsets[first] : offsets[last]]
        number = torch.arange(len(known), device=flat.device) + offsets[first]
        row = (number[:, None] >= offsets[None, first + 1 : last + 1]).sum(1)
        penalty = torch.zeros_like(scores)
        penalty[row, known] = math.inf
        scores = torch.nan_to_num(scores, -math.inf, math.inf, -math.inf)
        scores = torch.where(penalty > 0, -penalty, scores)
        top, index = torch.topk(scores, min(k, scores.shape[1]), dim=1)
        index[torch.isneginf(top)] = -1
        lists += [index]
        values += [top]
        first = last
    return torch.vstack(lists), torch.vstack(values)


def list_metrics(items, scores, target, ks=(10,)):
    if any(not 1 <= k <= items.shape[1] for k in ks):
        raise ValueError(f"cuts {tuple(ks)} for lists of {items.shape[1]}")
    scores = torch.nan_to_num(scores, -math.inf, math.inf, -math.inf)
    is_target = (items == target.view(-1, 1)) & ~torch.isneginf(scores)
    own = torch.where(is_target, scores, -math.inf).max(1, keepdim=True).values
    above, level = (scores > own).sum(1), (scores == own).sum(1)
    rank = above + level
    found = is_target.any(1) & ((level == 1) | (rank < items.shape[1]))
    out = {}
    for k in ks:
        hit = found & (rank <= k)
        share = hit.double().mean().item()
        out[f"hit_rate@{k}"] = out[f"recall@{k}"] = share
        out[f"mrr@{k}"] = torch.where(hit, 1 / rank.double(), 0).mean().item()
        out[f"ndcg@{k}"] = torch.where(hit, 1 / torch.log2(1 + rank.double()), 0).mean().item()
    return out


def auc(scores, labels):
    scores = torch.nan_to_num(scores, -math.inf, math.inf, -math.inf)
    pos, neg = scores[labels > 0], scores[labels <= 0].sort().values
    if min(len(pos), len(neg)) == 0:
        return math.nan
    wins = torch.searchsorted(neg, pos, side="left").sum()
    wins_and_ties = torch.searchsorted(neg, pos, side="right").sum()
    return (wins + wins_and_ties).item() / (2.0 * len(pos) * len(neg))


def normalized_entropy(logits, labels):
    y, x = labels.double(), logits.double()
    positives, rows = int(y.sum()), len(y)
    if positives in (0, rows):
        return math.nan
    loss = float((torch.logaddexp(x, torch.zeros_like(x)) - y * x).sum())
    negatives = rows - positives
    best = positives * math.log(rows / positives) + negatives * math.log(rows / negatives)
    return loss / best
