"""Golden values of kata 01: pooled bags and their gradients in float64 NumPy, entry by entry."""

from __future__ import annotations

import numpy as np

SEED = 101
ROWS, WIDTH = 7, 3
PADDING = 2
VALUES = [4, 1, 4, 2, 6, 2, 2, 0, 5, 3, 1]
OFFSETS = [0, 3, 3, 5, 7]  # an empty bag, one with a padding entry, one of nothing else


def pool(weight, mode, weights, upstream):
    """The bags, and the gradients of `weight` and `weights` under `upstream`, (B, D)."""
    out = np.zeros_like(upstream)
    to_rows = np.zeros_like(weight)
    to_weights = np.zeros(len(VALUES))
    ends = [*OFFSETS[1:], len(VALUES)]
    for bag, (start, end) in enumerate(zip(OFFSETS, ends, strict=True)):
        entries = [i for i in range(start, end) if VALUES[i] != PADDING]
        total = sum(weights[i] for i in entries)
        if not entries or (mode == "mean" and total == 0):
            continue
        if mode == "max":
            for column in range(weight.shape[1]):
                top = max(entries, key=lambda i, column=column: weight[VALUES[i], column])
                out[bag, column] = weight[VALUES[top], column]
                to_rows[VALUES[top], column] += upstream[bag, column]
            continue
        norm = total if mode == "mean" else 1.0
        out[bag] = sum(weights[i] * weight[VALUES[i]] for i in entries) / norm
        for i in entries:
            to_rows[VALUES[i]] += weights[i] / norm * upstream[bag]
            away = weight[VALUES[i]] - (out[bag] if mode == "mean" else 0)
            to_weights[i] = away @ upstream[bag] / norm
    return out, to_rows, to_weights


def golden():
    rng = np.random.default_rng(SEED)
    weight = rng.standard_normal((ROWS, WIDTH)).round(3)
    upstream = rng.standard_normal((len(OFFSETS), WIDTH)).round(3)
    weights = rng.uniform(0.2, 3.0, len(VALUES)).round(2)
    cases = {}
    for name, mode, given in (
        ("sum", "sum", None),
        ("mean", "mean", None),
        ("max", "max", None),
        ("weighted_sum", "sum", weights),
        ("weighted_mean", "mean", weights),
    ):
        used = np.ones(len(VALUES)) if given is None else given
        out, to_rows, to_weights = pool(weight, mode, used, upstream)
        cases[name] = {"mode": mode, "weights": given, "out": out, "weight_grad": to_rows}
        if given is not None:
            cases[name]["weights_grad"] = to_weights
    return {
        "weight": weight,
        "padding_idx": PADDING,
        "values": VALUES,
        "offsets": OFFSETS,
        "upstream": upstream,
        "bags": cases,
    }
