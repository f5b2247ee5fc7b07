"""Golden values of kata 08: pooling, its gradient, positions, ridge regression; float64 NumPy.

Pooling goes through each row's tokens one by one. The ridge solution comes from the least squares
problem with the penalty as further rows, not from the normal equations.
"""

from __future__ import annotations

import numpy as np

SEED = 808
ROWS, LENGTH, WIDTH = 6, 5, 3
MASK = [
    [1, 1, 1, 0, 0],  # padded on the right
    [0, 0, 0, 1, 1],  # on the left
    [1, 1, 1, 1, 1],  # not at all
    [0, 0, 1, 0, 0],  # one token, padded on both sides
    [1, 0, 1, 1, 0],  # with a hole
    [0, 0, 0, 0, 0],  # nothing
]


def chosen(mask, mode):
    """The places of a row that count."""
    places = [place for place, real in enumerate(mask) if real]
    return {"mean": places, "cls": places[:1], "last": places[-1:]}[mode]


def pooled(hidden, cotangent, mode):
    """The vectors, and the gradient of sum(vectors * cotangent)."""
    value, grad = np.zeros((ROWS, WIDTH)), np.zeros_like(hidden)
    for row, mask in enumerate(MASK):
        places = chosen(mask, mode)
        for place in places:
            value[row] += hidden[row, place] / len(places)
            grad[row, place] = cotangent[row] / len(places)
    return {"value": value, "gradient": grad}


def positions(mask):
    """The place of each real token among the real ones; -1 for padding, where any will do."""
    count, result = 0, []
    for real in mask:
        result.append(count if real else -1)
        count += real
    return result


def ridge_fit(text, target, ridge, weight):
    """The map as (weight, offset): x @ weight + offset."""
    share = weight / weight.sum()
    text_mean, target_mean = share @ text, share @ target
    root = np.sqrt(weight)[:, None]
    width = text.shape[1]
    left = np.vstack([(text - text_mean) * root, np.sqrt(ridge) * np.eye(width)])
    right = np.vstack([(target - target_mean) * root, np.zeros((width, target.shape[1]))])
    solution = np.linalg.lstsq(left, right, rcond=None)[0]
    return solution, target_mean - text_mean @ solution


def golden():
    rng = np.random.default_rng(SEED)
    hidden = rng.standard_normal((ROWS, LENGTH, WIDTH)).round(3)
    cotangent = rng.standard_normal((ROWS, WIDTH)).round(3)
    text = rng.standard_normal((7, 4)).round(3) + np.array([3.0, 0, -2, 0.5])
    target = rng.standard_normal((7, 2)).round(3) + np.array([1.0, -4.0])
    new = rng.standard_normal((3, 4)).round(3) * 2
    weight = np.array([1.0, 0.25, 3.0, 0.0, 2.0, 1.5, 0.5])
    fits = []
    for ridge, w in [(0.5, None), (0.5, weight), (20.0, weight), (1e-4, None)]:
        solution, offset = ridge_fit(text, target, ridge, np.ones(7) if w is None else w)
        fits.append({"ridge": ridge, "sample_weight": w, "forward": new @ solution + offset})
    return {
        "pool": {
            "hidden": hidden,
            "mask": MASK,
            "cotangent": cotangent,
            "modes": {mode: pooled(hidden, cotangent, mode) for mode in ("mean", "cls", "last")},
        },
        "positions": {"mask": MASK, "expected": [positions(mask) for mask in MASK]},
        "ridge": {"text": text, "target": target, "new": new, "fits": fits},
    }


if __name__ == "__main__":
    from pathlib import Path

    from regenerate import build

    print(build(Path(__file__)), end="")
