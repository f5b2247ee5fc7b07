"""Golden values of kata 06: ranking metrics by plain loops over each user's sorted items.

Undefined values (a user without a relevant item, one class only) are null.
"""

from __future__ import annotations

import math

import numpy as np

SEED = 606
USERS, ITEMS = 5, 7


def order(scores, relevance):
    """Items by falling score, the less relevant first among equal scores, NaN last."""
    value = [-math.inf if math.isnan(score) else score for score in scores]
    return sorted(range(len(value)), key=lambda i: (-value[i], relevance[i]))


def dcg(grades, gain):
    gains = [2.0**grade - 1 if gain == "exponential" else grade for grade in grades]
    return sum(value / math.log2(rank + 1) for rank, value in enumerate(gains, start=1))


def user_metrics(scores, relevance, k):
    """Every metric of one user with at least one relevant item."""
    ranked = [relevance[i] for i in order(scores, relevance)]
    ideal = sorted(relevance, reverse=True)
    hits = [rank for rank, grade in enumerate(ranked[:k], start=1) if grade > 0]
    relevant = sum(grade > 0 for grade in relevance)
    return {
        "ndcg": dcg(ranked[:k], "linear") / dcg(ideal[:k], "linear"),
        "ndcg exponential": dcg(ranked[:k], "exponential") / dcg(ideal[:k], "exponential"),
        "recall": len(hits) / relevant,
        "recall capped": len(hits) / min(relevant, k),
        "hit_rate": float(bool(hits)),
        "mrr": 1 / hits[0] if hits else 0.0,
    }


def table(scores, relevance, ks):
    """Metric -> cut -> value of each user, null without a relevant item."""
    result = {}
    for k in ks:
        for s, r in zip(scores, relevance, strict=True):
            defined = any(grade > 0 for grade in r)
            values = user_metrics(s, r if defined else [1] * len(r), k)
            for name, value in values.items():
                cuts = result.setdefault(name, {})
                cuts.setdefault(str(k), []).append(value if defined else None)
    return result


def pairs_auc(scores, labels):
    wins = [
        (a > b) + (a == b) / 2
        for a, x in zip(scores, labels, strict=True)
        if x == 1
        for b, y in zip(scores, labels, strict=True)
        if y == 0
    ]
    return sum(wins) / len(wins)


def entropy(logits, labels):
    probability = 1 / (1 + np.exp(-logits))
    loss = -(labels * np.log(probability) + (1 - labels) * np.log(1 - probability)).mean()
    base = labels.mean()
    return loss / -(base * math.log(base) + (1 - base) * math.log(1 - base))


def golden():
    rng = np.random.default_rng(SEED)
    scores = rng.permuted(np.arange(USERS * ITEMS)).reshape(USERS, ITEMS) / 4 - 3
    relevance = rng.integers(0, 4, (USERS, ITEMS)) * rng.integers(0, 2, (USERS, ITEMS))
    relevance[1] = [1, 0, 2, 3, 0, 1, 1]  # more relevant items than the smaller cuts
    relevance[3] = 0  # nothing to find
    tied = np.floor(scores / 2)
    logits = rng.standard_normal(9).round(2)
    labels = np.array([1, 0, 0, 1, 0, 1, 0, 0, 0])
    ties = np.array([0.5, 0.5, -1.0, 2.0, 0.5, -1.0, -2.5, 0.75, 2.0])
    ks = (1, 3, 7, 12)
    return {
        "distinct": {
            "scores": scores,
            "relevance": relevance,
            "expected": table(scores.tolist(), relevance.tolist(), ks),
        },
        "tied": {
            "scores": tied,
            "relevance": relevance,
            "expected": table(tied.tolist(), relevance.tolist(), ks),
        },
        "auc": {"scores": ties, "labels": labels, "expected": pairs_auc(ties, labels)},
        "normalized_entropy": {
            "logits": logits,
            "labels": labels,
            "expected": entropy(logits, labels),
        },
    }


if __name__ == "__main__":
    from pathlib import Path

    from regenerate import build

    print(build(Path(__file__)), end="")
