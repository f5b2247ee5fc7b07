"""Golden values of kata 09: exact search by sorting, and both stages by plain loops."""

from __future__ import annotations

import math

import numpy as np

SEED = 919
USERS, ITEMS, DIM, CANDIDATES = 4, 13, 5, 6


def unit(rng, rows):
    x = rng.standard_normal((rows, DIM)).round(3)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).round(6)


def golden():
    rng = np.random.default_rng(SEED)
    users, items = unit(rng, USERS), unit(rng, ITEMS)
    scores = users @ items.T
    seen = [sorted(rng.choice(ITEMS, n, replace=False).tolist()) for n in (2, 0, 5, 11)]
    logits = rng.permuted(np.arange(USERS * ITEMS)).reshape(USERS, ITEMS) / 4 - 5
    item_ids = (rng.permutation(ITEMS) * 7 + 100).tolist()
    lists = []
    for user in range(USERS):
        order = sorted(range(ITEMS), key=lambda item: -scores[user, item])
        candidates = [item for item in order if item not in seen[user]][:CANDIDATES]
        ranked = sorted(candidates, key=lambda item: -logits[user, item])
        lists.append([[item_ids[item], logits[user, item]] for item in ranked[:3]])
    return {
        "users": users,
        "items": items,
        "search": {
            "k": 4,
            "items": np.argsort(-scores, axis=1)[:, :4],
            "scores": -np.sort(-scores, axis=1)[:, :4],
        },
        "recommend": {
            "k": 3,
            "num_candidates": CANDIDATES,
            "user_ids": [31, 7, 12, 905],
            "item_ids": item_ids,
            "seen": seen,
            "logits": logits,
            "lists": lists,
        },
        "smallest_gap": float(min(np.diff(np.sort(scores, axis=1)).min(), math.inf)),
    }


if __name__ == "__main__":
    from pathlib import Path

    from regenerate import build

    print(build(Path(__file__)), end="")
