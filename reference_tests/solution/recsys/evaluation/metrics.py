"""Ranking metrics and full-ranking evaluation (kata 06).

What holds for all of them:

- Ties: equal scores bring no advantage. Among equal scores the less relevant item comes first, so
  that a constant scorer never beats one that knows something.
- NaN: a score that is not a number counts as minus infinity.
- Nothing to find: a user without any relevant item has no value, NaN, neither 0 nor 1.
- Inputs may have any layout and are never changed; results are on their device.
- Sums and quotients are computed in float64, whatever the dtype of the inputs.
- Cost: tensor operations on all users at once, no loop over users, items or rows; the work grows
  with the number of scores (times a logarithm where they are sorted), and so does the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def ranked_relevance(scores: Tensor, relevance: Tensor, k: int | None = None) -> Tensor:
    """Relevance of the items in the order of falling scores: what a user sees from the top down.

    Among equal scores the least relevant item comes first; NaN counts as minus infinity.

    Args:
        scores: (U, N) floating point. relevance: (U, N) of any number type or bool, grades of at
            least 0, fractions too; 0 is not relevant.
        k: how many places; all N by default, and N if k is larger.

    Returns:
        (U, min(k, N)) in the dtype of ``relevance``.

    Raises:
        ValueError: shapes that differ or are not 2-D, k below 1.
    """
    if scores.dim() != 2 or scores.shape != relevance.shape:
        raise ValueError(
            "scores and relevance must both be (U, N), "
            f"not {tuple(scores.shape)} and {tuple(relevance.shape)}"
        )
    num_items = scores.shape[1]
    k = num_items if k is None else _check_k(k)
    scores = _nan_to_last(scores)
    top = scores.topk(min(k + 1, num_items))  # one place more: does a tie cross the cut?
    ranked = relevance.gather(1, top.indices[:, :k])
    tied = (top.values[:, 1:] == top.values[:, :-1]).any(1)
    # only rows with a tie are sorted: by rising relevance, then, stably, by falling score
    order = relevance[tied].argsort()
    falling = scores[tied].gather(1, order).argsort(descending=True, stable=True)
    ranked[tied] = relevance[tied].gather(1, order.gather(1, falling[:, :k]))
    return ranked


def ndcg_at_k(scores: Tensor, relevance: Tensor, k: int, *, gain: str = "linear") -> Tensor:
    """Normalised discounted cumulative gain of each user.

    ``DCG = sum over ranks r = 1 .. k of gain(r) / log2(r + 1)``, divided by the DCG of the best
    possible order of the same user's items, cut at the same k. ``gain="linear"`` is the grade,
    ``"exponential"`` is ``2 ** grade - 1``; they agree for grades 0 and 1.

    Args:
        scores, relevance: (U, N) as in :func:`ranked_relevance`. k: at least 1; N if larger.

    Returns:
        (U,) float64, from 0 to 1 (exponential: for grades below 1000); NaN for a user without any
        relevant item, whose NDCG is not defined: leave them out of a mean
        (:func:`mean_over_users`).

    Raises:
        ValueError: an unknown gain, or as in :func:`ranked_relevance`.

    Source: Jarvelin and Kekalainen 2002, "Cumulated Gain-Based Evaluation of IR Techniques";
    exponential gain: Burges et al. 2005.
    """
    if gain not in ("linear", "exponential"):
        raise ValueError(f"gain must be 'linear' or 'exponential', not {gain!r}")
    ranked = ranked_relevance(scores, relevance, k).double()
    grades = relevance.byte() if relevance.dtype == torch.bool else relevance  # topk takes no bool
    ideal = grades.topk(ranked.shape[1]).values.double()
    if gain == "exponential":
        ranked, ideal = ranked.exp2() - 1, ideal.exp2() - 1
    places = torch.arange(ranked.shape[1], dtype=torch.float64, device=scores.device)
    discount = (places + 2).log2().reciprocal()
    return (ranked @ discount) / (ideal @ discount)  # 0 / 0 is NaN: nothing relevant


def recall_at_k(scores: Tensor, relevance: Tensor, k: int, *, capped: bool = False) -> Tensor:
    """Share of a user's relevant items (grade above 0) among the first k.

    Divided by the number of relevant items; with ``capped=True`` by the smaller of that number and
    k, so that a perfect list always has 1. Arguments and errors as in :func:`ranked_relevance`.

    Returns:
        (U,) float64; NaN for a user without any relevant item.
    """
    hits = (ranked_relevance(scores, relevance, k) > 0).sum(1)
    relevant = (relevance > 0).sum(1).double()
    return hits / (relevant.clamp(max=k) if capped else relevant)


def hit_rate_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    """1 for a user with a relevant item (grade above 0) among the first k, else 0.

    Arguments and errors as in :func:`ranked_relevance`.

    Returns:
        (U,) float64; NaN for a user without any relevant item.
    """
    hit = (ranked_relevance(scores, relevance, k) > 0).any(1).double()
    return hit.masked_fill(~(relevance > 0).any(1), float("nan"))


def mrr_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Reciprocal rank of a user's first relevant item (grade above 0) in the first k, else 0.

    Arguments and errors as in :func:`ranked_relevance`.

    Returns:
        (U,) float64; NaN for a user without any relevant item.

    Source: Voorhees 1999, "The TREC-8 Question Answering Track Report".
    """
    relevant = ranked_relevance(scores, relevance, k) > 0
    rank = relevant.double().argmax(1) + 1  # the first True; also 1 where there is none
    reciprocal = relevant.any(1).double() / rank
    return reciprocal.masked_fill(~(relevance > 0).any(1), float("nan"))


def mean_over_users(values: Tensor) -> tuple[float, int]:
    """Mean of the users whose value is defined (not NaN), and how many they are.

    Args:
        values: (U,) floating point.

    Returns:
        (mean, count); the mean is NaN if count is 0.
    """
    defined = values[~values.isnan()]
    return float(defined.double().mean()), len(defined)  # the mean of none is NaN


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    """Rank, from 1, of one target item for each user, the worst that its score allows.

    ``1 + the number of other items whose score is not below the target's``; NaN counts as minus
    infinity.

    Args:
        scores: (U, N). target: (U,) int64 column in ``0 .. N - 1``.

    Returns:
        (U,) int64.
    """
    scores = _nan_to_last(scores)
    return (scores >= scores.gather(1, target[:, None])).sum(1)


def full_ranking(
    score_fn: Callable[[Tensor], Tensor],
    num_users: int,
    *,
    seen: tuple[Tensor, Tensor],
    k: int,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Rank the whole catalogue for every user, without the items that they have seen.

    Users are scored in order, ``chunk_size`` at a time, one call of ``score_fn`` each, so that no
    (num_users, N) tensor is made and, within a chunk, there is no loop over users; the result does
    not depend on ``chunk_size``. Nothing is sampled (Krichene and Rendle 2020, "On
    Sampled Metrics for Item Recommendation").

    Args:
        score_fn: ``score_fn(users)``, (b,) int64 user indices to (b, N) scores of any number type,
            compared as float32; the tensor that it returns is not changed.
        num_users: at least 1; the users are ``0 .. num_users - 1``. chunk_size: at least 1.
        seen: ``(items, offsets)``, int64, on the device of the scores: user u has seen
            ``items[offsets[u] : offsets[u + 1]]`` (perhaps none, perhaps one twice), offsets of
            (num_users + 1,).
        k: length of the lists, at least 1; N if larger.

    Returns:
        (items, scores), each (num_users, min(k, N)): item indices with falling scores, int64, and
        their scores, float32; equal scores in any order. NaN counts as minus infinity, and an item
        with score minus infinity is never recommended: where fewer than min(k, N) items are left,
        the rest of the list is item -1 with score minus infinity.

    Raises:
        ValueError: k below 1.
    """
    _check_k(k)
    items, offsets = seen
    all_items, all_scores = [], []
    for first in range(0, num_users, chunk_size):
        users = torch.arange(first, min(first + chunk_size, num_users), device=items.device)
        scores = _nan_to_last(score_fn(users).float())  # a copy, so that it may be written to
        start, stop = offsets[users[0]], offsets[users[-1] + 1]
        counts = offsets[users + 1] - offsets[users]
        row = torch.repeat_interleave(torch.arange(len(users), device=items.device), counts)
        scores[row, items[start:stop]] = float("-inf")
        top = scores.topk(min(k, scores.shape[1]))
        all_items.append(top.indices.masked_fill(top.values == float("-inf"), -1))
        all_scores.append(top.values)
    return torch.cat(all_items), torch.cat(all_scores)


def list_metrics(
    items: Tensor, scores: Tensor, target: Tensor, ks: Sequence[int] = (10,)
) -> dict[str, float]:
    """Metrics of ranked lists for one target item per user, as :func:`full_ranking` makes them.

    The rank of the target is the number of places whose score is not below its own (ties count
    against it). A target that ties with others down to the last place is not found, since the tie
    may go on beyond the list. (A target alone in the last place is found; for a list longer than
    the cut that makes no difference.) NaN counts as minus infinity, and a target with that score
    is not found. With one relevant item, recall is the hit rate and the ideal DCG is 1. A target
    that a list repeats is found once, at its best score (whether its repeats are places of their
    own is left open: :func:`full_ranking` repeats nothing).

    Args:
        items: (U, K) item indices, best first, -1 for no item. scores: (U, K), falling.
        target: (U,) item indices, 0 or above. ks: cuts, each from 1 to K.

    Returns:
        for every k: ``hit_rate@k``, ``ndcg@k``, ``mrr@k``, ``recall@k``, means over all users (a
        target that is not found counts 0).

    Raises:
        ValueError: a cut below 1, or beyond K (the list is too short to say).
    """
    width = items.shape[1]
    _check_k(min(ks))
    if max(ks) > width:
        raise ValueError(f"lists hold {width} items, too few for a cut at {max(ks)}")
    scores = _nan_to_last(scores)
    own = scores.masked_fill(items != target[:, None], float("-inf")).amax(1, keepdim=True)
    rank = (scores >= own).sum(1)
    open_tie = (rank == width) & ((scores == own).sum(1) > 1)
    hit = (own[:, 0] > float("-inf")) & ~open_tie
    result = {}
    for k in ks:
        within = (hit & (rank <= k)).double()
        result[f"hit_rate@{k}"] = float(within.mean())
        result[f"ndcg@{k}"] = float((within / (rank + 1).double().log2()).mean())
        result[f"mrr@{k}"] = float((within / rank).mean())
        result[f"recall@{k}"] = result[f"hit_rate@{k}"]
    return result


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, a tie counting half.

    Over all pairs of all rows, never averaged over batches, in O(N log N) time and O(N) memory: no
    table of pairs. NaN scores count as minus infinity.

    Args:
        scores: (N,) floating point. labels: (N,), 0 or 1.

    Returns:
        From 0 to 1; NaN if there is only one class (no pair to compare).

    Source: Hanley and McNeil 1982; by mid-ranks it is the Mann-Whitney U statistic.
    """
    positive = labels > 0
    num_pos = int(positive.sum())
    num_neg = len(labels) - num_pos
    _, group, count = _nan_to_last(scores).unique(return_inverse=True, return_counts=True)
    count = count.double()
    mid_rank = count.cumsum(0) - (count - 1) / 2
    rank_sum = mid_rank[group][positive].sum()
    # the positives' pairs among themselves off; one class only: 0 / 0 is NaN
    return float((rank_sum - num_pos * (num_pos + 1) / 2) / (num_pos * num_neg))


def normalized_entropy(logits: Tensor, labels: Tensor) -> float:
    """Log loss divided by the log loss of always predicting the base rate: below 1 is useful.

    ``NE = mean(logloss(logits, labels)) / -(p ln p + (1 - p) ln(1 - p))``, p the mean label.

    Args:
        logits: (N,), before the sigmoid, finite. labels: (N,), 0 or 1.

    Returns:
        At least 0; NaN if there is only one class.

    Source: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", eq. 1.
    """
    labels = labels.double()
    base = labels.mean()
    entropy = -(base * base.log() + (1 - base) * (1 - base).log())  # of one class: 0 ln 0 is NaN
    return float(F.binary_cross_entropy_with_logits(logits.double(), labels) / entropy)


def _nan_to_last(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))


def _check_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return k
