"""The first k places one after the other: the worst of the best item is taken out k times."""

from __future__ import annotations

import math

import torch


def _check(scores, relevance, k):
    if not (scores.dim() == relevance.dim() == 2 and scores.size() == relevance.size()):
        raise ValueError("scores and relevance: one (U, N) shape")
    if k < 1:
        raise ValueError("k: at least 1")


def _finite(scores):
    return scores.masked_fill(scores != scores, -math.inf)


def _walk(scores, relevance, k):
    """Yield the grades on place 1, 2, ... of every user."""
    scores, left = _finite(scores), torch.ones_like(scores, dtype=torch.bool)
    grades = relevance.double()
    for _ in range(min(k, scores.size(1))):
        best = scores.masked_fill(~left, -math.inf).amax(1, keepdim=True)
        tied = left & (scores == best)
        item = grades.masked_fill(~tied, math.inf).argmin(1, keepdim=True)
        left = left.scatter(1, item, False)
        yield relevance.gather(1, item).squeeze(1)


def ranked_relevance(scores, relevance, k=None):
    _check(scores, relevance, 1 if k is None else k)
    return torch.stack(list(_walk(scores, relevance, scores.size(1) if k is None else k)), 1)


def ndcg_at_k(scores, relevance, k, *, gain="linear"):
    _check(scores, relevance, k)
    if gain not in {"linear", "exponential"}:
        raise ValueError(f"unknown gain: {gain}")

    def dcg(by):
        total = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
        for place, grade in enumerate(_walk(by, relevance, k)):
            grade = grade.double()
            total += (grade if gain == "linear" else 2**grade - 1) / math.log2(place + 2)
        return total

    return dcg(scores) / dcg(relevance.double())


def _hits(scores, relevance, k):
    _check(scores, relevance, k)
    return [(grade > 0).double() for grade in _walk(scores, relevance, k)]


def recall_at_k(scores, relevance, k, *, capped=False):
    found = sum(_hits(scores, relevance, k))
    relevant = (relevance > 0).sum(1).double()
    return found / (relevant.clamp(max=float(k)) if capped else relevant)


def hit_rate_at_k(scores, relevance, k):
    none = (relevance > 0).sum(1) == 0
    return sum(_hits(scores, relevance, k)).clamp(max=1).masked_fill(none, math.nan)


def mrr_at_k(scores, relevance, k):
    value = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    for place, hit in enumerate(_hits(scores, relevance, k)):
        value = torch.maximum(value, hit / (place + 1))
    return value.masked_fill((relevance > 0).sum(1) == 0, math.nan)


def mean_over_users(values):
    values = values[values == values].double()
    return (float(values.mean()), len(values)) if len(values) else (math.nan, 0)


def rank_of_target(scores, target):
    scores = _finite(scores)
    own = scores.gather(1, target.unsqueeze(-1))
    return 1 + (scores > own).sum(1) + (scores == own).sum(1) - 1


def full_ranking(score_fn, num_users, *, seen, k, chunk_size=1024):
    if k < 1:
        raise ValueError("k: at least 1")
    items, offsets = seen
    everybody = torch.repeat_interleave(offsets[1:] - offsets[:-1])
    lists, values = [], []
    for users in torch.split(torch.arange(num_users, device=items.device), chunk_size):
        scores = _finite(score_fn(users).float()).clone()
        here = slice(offsets[users[0]].item(), offsets[users[-1] + 1].item())
        scores[everybody[here] - users[0], items[here]] = -math.inf
        chosen, best = [], []
        for _ in range(min(k, scores.size(1))):
            value, item = scores.max(1)
            chosen.append(torch.where(value == -math.inf, -1, item))
            best.append(value)
            scores = scores.scatter(1, item.unsqueeze(1), -math.inf)
        lists.append(torch.stack(chosen, 1))
        values.append(torch.stack(best, 1))
    return torch.cat(lists), torch.cat(values)


def list_metrics(items, scores, target, ks=(10,)):
    width = items.size(1)
    if min(ks) < 1 or width < max(ks):
        raise ValueError("a cut that the lists cannot judge")
    scores = _finite(scores)
    own = torch.full_like(scores[:, 0], -math.inf)
    for place in range(width):
        own = torch.where(items[:, place] == target, torch.maximum(own, scores[:, place]), own)
    rank = torch.zeros_like(target)
    level = torch.zeros_like(target)
    for place in range(width):
        rank = rank + (scores[:, place] >= own)
        level = level + (scores[:, place] == own)
    found = (own > -math.inf) & ((rank < width) | (level < 2))
    result = {}
    for k in ks:
        hit = (found & (rank <= k)).double()
        result[f"hit_rate@{k}"] = result[f"recall@{k}"] = hit.mean().item()
        result[f"ndcg@{k}"] = (hit * math.log(2) / torch.log(rank + 1.0).double()).mean().item()
        result[f"mrr@{k}"] = (hit / rank.double()).mean().item()
    return result


def auc(scores, labels):
    scores, order = _finite(scores).sort()
    y = labels[order] > 0
    _, sizes = torch.unique_consecutive(scores, return_counts=True)
    ends = sizes.cumsum(0)
    pos = torch.diff(torch.cat([sizes.new_zeros(1), y.cumsum(0)[ends - 1]]))
    neg = sizes - pos
    below = neg.cumsum(0) - neg
    pairs = pos.sum().double() * neg.sum()
    return float((pos * (below + neg / 2.0).double()).sum() / pairs)


def normalized_entropy(logits, labels):
    x, y = logits.double(), labels.double()
    p = y.mean().item()
    if p == 0 or p == 1:
        return math.nan
    loss = x.clamp(min=0) - x * y + torch.log1p(torch.exp(-x.abs()))
    return loss.mean().item() / -(p * math.log(p) + (1 - p) * math.log(1 - p))
