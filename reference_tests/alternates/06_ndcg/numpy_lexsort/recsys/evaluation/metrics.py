"""NumPy throughout: lexsort for the order, searchsorted for AUC; tensors only at the edges."""

from __future__ import annotations

import numpy as np
import torch


def _scores(tensor):
    values = tensor.detach().double().cpu().numpy()
    return np.where(np.isnan(values), -np.inf, values)


def _grades(tensor):
    return tensor.detach().double().cpu().numpy()


def _back(array, like):
    return torch.as_tensor(np.ascontiguousarray(array), device=like.device)


def _places(scores, relevance, k):
    if scores.ndim != 2 or relevance.ndim != 2 or tuple(scores.shape) != tuple(relevance.shape):
        raise ValueError("scores and relevance must have one and the same (U, N) shape")
    if k is not None and k < 1:
        raise ValueError("k has to be 1 or more")
    return np.lexsort((_grades(relevance), -_scores(scores)), axis=1)[:, :k]


def _shown(scores, relevance, k):
    return np.take_along_axis(_grades(relevance), _places(scores, relevance, k), 1)


def ranked_relevance(scores, relevance, k=None):
    places = _places(scores, relevance, k)
    return torch.gather(relevance, 1, _back(places, relevance))


def ndcg_at_k(scores, relevance, k, *, gain="linear"):
    try:
        gained = {"linear": lambda x: x, "exponential": lambda x: np.power(2.0, x) - 1}[gain]
    except KeyError:
        raise ValueError(f"no gain is called {gain}") from None
    shown = _shown(scores, relevance, k)
    best = -np.sort(-_grades(relevance), axis=1)[:, : shown.shape[1]]
    weights = 1 / np.log2(np.arange(2, shown.shape[1] + 2))
    with np.errstate(invalid="ignore"):
        return _back((gained(shown) * weights).sum(1) / (gained(best) * weights).sum(1), scores)


def recall_at_k(scores, relevance, k, *, capped=False):
    hits = (_shown(scores, relevance, k) > 0).sum(1)
    there = (_grades(relevance) > 0).sum(1)
    with np.errstate(invalid="ignore"):
        return _back(hits / (np.minimum(there, k) if capped else there), scores)


def hit_rate_at_k(scores, relevance, k):
    hit = (_shown(scores, relevance, k) > 0).any(1)
    return _back(np.where((_grades(relevance) > 0).any(1), hit.astype(float), np.nan), scores)


def mrr_at_k(scores, relevance, k):
    shown = _shown(scores, relevance, k) > 0
    inverse = (shown / np.arange(1, shown.shape[1] + 1)).max(1)
    return _back(np.where((_grades(relevance) > 0).any(1), inverse, np.nan), scores)


def mean_over_users(values):
    values = _grades(values)
    kept = values[np.isfinite(values)]
    return (kept.mean().item() if kept.size else np.nan), kept.size


def rank_of_target(scores, target):
    values = _scores(scores)
    own = np.take_along_axis(values, target.cpu().numpy()[:, None], 1)
    return _back((values >= own).sum(1), scores)


def full_ranking(score_fn, num_users, *, seen, k, chunk_size=1024):
    if k < 1:
        raise ValueError("k has to be 1 or more")
    items, offsets = (each.cpu().numpy() for each in seen)
    found = []
    for begin in range(0, num_users, chunk_size):
        end = min(begin + chunk_size, num_users)
        users = torch.arange(begin, end, device=seen[0].device)
        scores = score_fn(users).detach().float().cpu().numpy()
        hidden = np.isnan(scores)
        rows = np.repeat(np.arange(end - begin), np.diff(offsets[begin : end + 1]))
        hidden[rows, items[offsets[begin] : offsets[end]]] = True
        scores = np.where(hidden, np.float32(-np.inf), scores)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(scores, order, 1)
        found.append((np.where(np.isneginf(values), -1, order), values))
    lists, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return _back(lists, seen[0]), _back(values, seen[0])


def list_metrics(items, scores, target, ks=(10,)):
    if min(ks) < 1 or max(ks) > items.shape[1]:
        raise ValueError(f"cuts {ks} do not fit lists of {items.shape[1]}")
    values, wanted = _scores(scores), target.cpu().numpy()[:, None]
    own = np.where(items.cpu().numpy() == wanted, values, -np.inf).max(1)
    rank = (values >= own[:, None]).sum(1).astype(float)
    several = (values == own[:, None]).sum(1) > 1
    rank[np.isneginf(own) | (several & (rank == items.shape[1]))] = np.inf
    found = {}
    for k in ks:
        capped = np.where(rank <= k, rank, np.inf)
        found[f"hit_rate@{k}"] = found[f"recall@{k}"] = float(np.isfinite(capped).mean())
        found[f"mrr@{k}"] = float((1 / capped).mean())
        found[f"ndcg@{k}"] = float((1 / np.log2(capped + 1)).mean())
    return found


def auc(scores, labels):
    values, positive = _scores(scores), _grades(labels) > 0
    ours, theirs = values[positive], np.sort(values[~positive])
    if not len(ours) or not len(theirs):
        return np.nan
    below = np.searchsorted(theirs, ours, "left").sum()
    not_above = np.searchsorted(theirs, ours, "right").sum()
    return float(below + not_above) / 2 / (len(ours) * len(theirs))


def normalized_entropy(logits, labels):
    x, y = _grades(logits), _grades(labels)
    p = y.mean()
    if p in (0.0, 1.0):
        return np.nan
    loss = np.logaddexp(0, x) - x * y
    return float(loss.mean() / -(p * np.log(p) + (1 - p) * np.log1p(-p)))
