"""A small class holds the ranked table; AUC is the area under the ROC curve, by trapezoids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


def broken_last(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores.isnan(), float("-inf"))


@dataclass
class Ranking:
    """Users' grades in the order of falling scores, and what is read off it."""

    scores: Tensor
    grades: Tensor
    k: int | None

    def __post_init__(self) -> None:
        if self.scores.shape != self.grades.shape or len(self.scores.shape) != 2:
            raise ValueError("two (U, N) tensors are needed")
        if self.k is not None and self.k < 1:
            raise ValueError("k must be positive")

    @cached_property
    def shown(self) -> Tensor:
        by_grade = self.grades.to(torch.float64).argsort(dim=-1)
        scores = torch.take_along_dim(broken_last(self.scores), by_grade, -1)
        by_score = torch.sort(scores, dim=-1, descending=True, stable=True)[1]
        return torch.take_along_dim(self.grades, torch.take_along_dim(by_grade, by_score, -1), -1)[
            :, : self.k
        ]

    @cached_property
    def hits(self) -> Tensor:
        return self.shown > 0

    @cached_property
    def total(self) -> Tensor:
        return (self.grades > 0).sum(-1)

    def defined(self, values: Tensor) -> Tensor:
        values = values.to(torch.float64)
        return torch.where(self.total > 0, values, values.new_tensor(float("nan")))


def ranked_relevance(scores: Tensor, relevance: Tensor, k: int | None = None) -> Tensor:
    return Ranking(scores, relevance, k).shown


def ndcg_at_k(scores: Tensor, relevance: Tensor, k: int, *, gain: str = "linear") -> Tensor:
    gains = {"linear": lambda g: g, "exponential": lambda g: torch.exp2(g) - 1}
    if gain not in gains:
        raise ValueError(f"gain is one of {sorted(gains)}")
    ranking = Ranking(scores, relevance, k)
    value = gains[gain](relevance.to(torch.float64)).sort(dim=-1, descending=True).values
    shown = gains[gain](ranking.shown.to(torch.float64))
    weight = torch.log2(torch.arange(2, shown.shape[-1] + 2, device=shown.device).double())
    return ranking.defined((shown / weight).sum(-1) / (value[:, : len(weight)] / weight).sum(-1))


def recall_at_k(scores: Tensor, relevance: Tensor, k: int, *, capped: bool = False) -> Tensor:
    ranking = Ranking(scores, relevance, k)
    most = ranking.total.clamp(max=k) if capped else ranking.total
    return ranking.defined(ranking.hits.sum(-1).double() / most)


def hit_rate_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    ranking = Ranking(scores, relevance, k)
    return ranking.defined(ranking.hits.any(-1))


def mrr_at_k(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    ranking = Ranking(scores, relevance, k)
    before = (ranking.hits.cumsum(-1) == 0).sum(-1)  # places before the first hit
    return ranking.defined(ranking.hits.any(-1) / (before + 1.0).double())


def mean_over_users(values: Tensor) -> tuple[float, int]:
    kept = values.double()[values.isfinite()]
    return kept.mean().item(), kept.numel()


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    scores = broken_last(scores)
    own = scores[torch.arange(target.numel(), device=target.device), target]
    return torch.count_nonzero(scores.ge(own.reshape(-1, 1)), dim=1)


def full_ranking(score_fn, num_users, *, seen, k, chunk_size=1024):
    if k < 1:
        raise ValueError("k must be positive")
    items, offsets = seen
    counts = offsets.diff()

    def chunk(first):
        users = torch.arange(first, min(first + chunk_size, num_users), device=items.device)
        with torch.inference_mode():
            scores = score_fn(users).float()
            rows = torch.repeat_interleave(users - first, counts[users])
            mine = items[int(offsets[first]) : int(offsets[int(users[-1]) + 1])]
            taken = torch.zeros_like(scores).index_put((rows, mine), scores.new_ones(()), True)
            scores = broken_last(scores).masked_fill(taken > 0, float("-inf"))
            best, index = scores.topk(min(k, scores.size(-1)))
        return index.where(best > float("-inf"), -torch.ones_like(index)), best

    chunks = [chunk(first) for first in range(0, num_users, chunk_size)]
    return tuple(torch.cat(each) for each in zip(*chunks, strict=True))


def list_metrics(items, scores, target, ks=(10,)):
    ks, width = list(ks), items.shape[-1]
    if min(ks) < 1 or max(ks) > width:
        raise ValueError(f"cuts from 1 to {width}")
    scores = broken_last(scores)
    match = items.eq(target[:, None])
    own = scores.where(match, scores.new_tensor(float("-inf"))).max(dim=-1)[0][:, None]
    ties = scores.eq(own).sum(-1)
    rank = scores.ge(own).sum(-1)
    found = own.squeeze(-1).ne(float("-inf")) & ~(rank.eq(width) & ties.gt(1))
    cut = torch.as_tensor(ks, device=rank.device)
    hit = (found[:, None] & (rank[:, None] <= cut)).double()  # (U, cuts)
    means = {
        "hit_rate": hit.mean(0),
        "recall": hit.mean(0),
        "mrr": (hit / rank[:, None]).mean(0),
        "ndcg": (hit / torch.log2(rank[:, None] + 1.0).double()).mean(0),
    }
    return {f"{name}@{k}": float(row[i]) for name, row in means.items() for i, k in enumerate(ks)}


def auc(scores, labels):
    order = torch.argsort(broken_last(scores), descending=True)
    sorted_scores, y = broken_last(scores)[order], (labels > 0)[order].double()
    last = torch.ones_like(y, dtype=torch.bool)  # of a group of equal scores: one point each
    last[:-1] = sorted_scores[1:] != sorted_scores[:-1]
    hits, misses = y.cumsum(0)[last], (1 - y).cumsum(0)[last]
    curve = F.pad(hits, (1, 0)), F.pad(misses, (1, 0))
    return float(torch.trapezoid(*curve) / (hits[-1] * misses[-1]))


def normalized_entropy(logits, labels):
    logits, labels = logits.double(), labels.double()
    sign = 2 * labels - 1
    p = labels.mean()
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return float(F.softplus(-sign * logits).mean() / entropy) if entropy > 0 else float("nan")
