"""The deciding figures, computed here from raw ranked lists: the learner's metrics never judge."""

from __future__ import annotations

import numpy as np

Seen = tuple[np.ndarray, np.ndarray]  # items seen, and where each user's begin (and the end)


class InvalidLists(ValueError):
    """Ranked lists that cannot be judged; the message says why."""


def seen_offsets(user: np.ndarray, item: np.ndarray, num_users: int) -> Seen:
    """CSR of the items of each user: (values, offsets)."""
    order = np.argsort(user, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=num_users))])
    return item[order], offsets


def check_lists(
    items: np.ndarray,
    scores: np.ndarray,
    *,
    num_users: int,
    num_items: int,
    seen: Seen,
    length: int,
) -> None:
    """Refuse lists that are not what they should be.

    Args:
        items, scores: (num_users, K) item indices (-1: nothing) and scores, best first.
        seen: CSR of the items that must not be recommended. length: smallest K.

    Raises:
        InvalidLists: wrong shape, unknown items, an item twice, a seen item, scores that rise.
    """
    if items.shape != scores.shape or items.ndim != 2 or len(items) != num_users:
        raise InvalidLists(
            f"lists must be ({num_users}, K) items and scores, not {items.shape}, {scores.shape}"
        )
    if items.shape[1] < min(length, num_items):
        raise InvalidLists(f"lists hold {items.shape[1]} items, {length} are needed")
    if items.min() < -1 or items.max() >= num_items:
        raise InvalidLists(f"lists hold items outside 0 .. {num_items - 1}")
    ordered = np.sort(items, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise InvalidLists("a list holds the same item twice")
    values, offsets = seen
    pair = np.repeat(np.arange(num_users), np.diff(offsets)) * num_items + values
    listed = (np.arange(num_users)[:, None] * num_items + items)[items >= 0]
    if (leaked := int(np.isin(listed, pair).sum())):
        raise InvalidLists(f"lists recommend {leaked} items that the user has already seen")
    clean = np.where(np.isnan(scores), -np.inf, scores)
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        if (np.diff(clean, axis=1) > 0).any():
            raise InvalidLists("scores rise within a list: the best item must come first")


def target_ranks(items: np.ndarray, scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Worst rank, from 1, that the target's score allows; 0 where the list does not hold it.

    Ties count against the target, NaN counts as minus infinity, and a tie that reaches the end of
    the list is not found, since it may go on beyond it.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    found = items == target[:, None]
    own = np.where(found, scores, -np.inf).max(1, keepdims=True)
    rank = (scores >= own).sum(1)
    open_tie = (rank == items.shape[1]) & ((scores == own).sum(1) > 1)
    listed = found.any(1) & np.isfinite(own[:, 0])
    return np.where(listed & ~open_tie, rank, 0)


def per_user(ranks: np.ndarray, metric: str, k: int) -> np.ndarray:
    """Values of ``hit_rate``, ``recall`` (the same for one target), ``ndcg`` or ``mrr`` at k."""
    hit = (ranks > 0) & (ranks <= k)
    rank = np.maximum(ranks, 1)
    if metric in ("hit_rate", "recall"):
        return hit.astype(np.float64)
    if metric == "ndcg":
        return hit / np.log2(rank + 1.0)
    if metric == "mrr":
        return hit / rank
    raise ValueError(f"unknown metric {metric!r}")


def bootstrap_interval(
    values: np.ndarray, *, seed: int = 0, rounds: int = 1000
) -> tuple[float, float]:
    """95 % interval of the mean by resampling users."""
    rng = np.random.default_rng(seed)
    means = rng.choice(values, size=(rounds, len(values))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def popularity_lists(
    item: np.ndarray, num_items: int, seen: Seen, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent items that each user has not seen: the baseline that validates the rest.

    Args:
        item: item of each interaction that may be counted.
    """
    counts = np.bincount(item, minlength=num_items).astype(np.float64)
    values, offsets = seen
    num_users = len(offsets) - 1
    scores = np.tile(counts, (num_users, 1))
    scores[np.repeat(np.arange(num_users), np.diff(offsets)), values] = -np.inf
    top = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    top_scores = np.take_along_axis(scores, top, axis=1)
    return np.where(np.isneginf(top_scores), -1, top), top_scores


def ranking_figures(items: np.ndarray, logits: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """How well logits tell the chosen candidate from the others of its list.

    Over the lists that hold the target; the probability of a candidate is the softmax over its
    list, and log loss and entropy are those of the yes-or-no question put to every pair.

    Args:
        items, logits: (U, C) candidates (-1: none) and their logits. target: (U,).

    Returns:
        lists: how many hold the target. auc: mean over lists, a tie counts half. logloss: of the
        pairs. normalized_entropy: logloss over that of always saying the share of positives.
    """
    held = (items == target[:, None]).any(1)
    items, target = items[held], target[held]
    z = np.where(np.isnan(logits[held]) | (items < 0), -np.inf, logits[held]).astype(np.float64)
    positive, real = items == target[:, None], items >= 0
    own = np.where(positive, z, -np.inf).max(1, keepdims=True)
    others = real & ~positive
    auc = ((z < own) & others).sum(1) + 0.5 * ((z == own) & others).sum(1)
    z = z - z.max(1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p = np.clip(p, 1e-12, 1 - 1e-12)
    loss = -np.where(positive, np.log(p), np.log1p(-p))[real].mean()
    base = positive[real].mean()
    entropy = -(base * np.log(base) + (1 - base) * np.log(1 - base))
    return {
        "lists": len(items),
        "auc": float((auc / others.sum(1).clip(min=1)).mean()),
        "logloss": float(loss),
        "normalized_entropy": float(loss / entropy),
    }


def reorder(items: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists in the order of falling logits; candidates that are none come last."""
    logits = np.where(np.isnan(logits) | (items < 0), -np.inf, logits)
    order = np.argsort(-logits, axis=1, kind="stable")
    return np.take_along_axis(items, order, 1), np.take_along_axis(logits, order, 1)


def recall_of_lists(
    lists: np.ndarray, user: np.ndarray, item: np.ndarray, k: int
) -> np.ndarray:
    """Share of each user's chosen items that the first k of their list hold.

    Args:
        lists: (num_users, K) items, best first. user, item: (n,) what was chosen, at least one.

    Returns:
        (users with a choice,) recalls, divided by the number of chosen items.
    """
    found = (lists[user, :k] == item[:, None]).any(1)
    chosen = np.bincount(user, minlength=len(lists))
    hits = np.bincount(user, weights=found, minlength=len(lists))
    return hits[chosen > 0] / chosen[chosen > 0]


def content_lists(
    text: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    num_users: int,
    candidates: np.ndarray,
    k: int,
) -> np.ndarray:
    """The candidates whose text is most like the mean text of what a user chose, (num_users, k).

    Args:
        text: (num_items, W) centred vectors. user, item: (n,) what is known.
    """
    profile = np.zeros((num_users, text.shape[1]))
    np.add.at(profile, user, text[item])
    scores = profile @ text[candidates].T  # the length of a profile does not change its order
    return candidates[np.argsort(-scores, axis=1, kind="stable")[:, :k]]
