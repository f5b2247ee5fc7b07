"""Golden values of kata 07: a small network, quartiles of times, and when compiling pays."""

from __future__ import annotations

import numpy as np

SEED = 707
BATCH, WIDTH, HIDDEN, OUT = 5, 7, 11, 3


def golden():
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((BATCH, WIDTH)).round(3)
    w1 = rng.standard_normal((HIDDEN, WIDTH)).round(3)
    b1 = rng.standard_normal(HIDDEN).round(3)
    w2 = rng.standard_normal((OUT, HIDDEN)).round(3)
    b2 = rng.standard_normal(OUT).round(3)
    cotangent = rng.standard_normal((BATCH, OUT)).round(3)
    hidden = np.tanh(x @ w1.T + b1)
    back = (cotangent @ w2) * (1 - hidden**2)
    times = (rng.permutation(9) + rng.random(9)).round(3)
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
    cases = [(0.5, 0.25, 10.0, calls) for calls in (0, 39, 40, 41, 400)]
    cases += [(0.25, 0.5, 0.0, 1000), (0.5, 0.5, 0.0, 1000), (0.5, 0.25, 0.0, 1), (1, 0, 2, 3)]
    return {
        "network": {
            "x": x,
            "cotangent": cotangent,
            "state": {"0.weight": w1, "0.bias": b1, "2.weight": w2, "2.bias": b2},
            "output": hidden @ w2.T + b2,
            "gradients": {
                "0.weight": back.T @ x,
                "0.bias": back.sum(0),
                "2.weight": cotangent.T @ hidden,
                "2.bias": cotangent.sum(0),
            },
        },
        "timing": {"times": times, "low": low, "median": median, "high": high},
        "pays_off": [[*case, case[2] + case[3] * case[1] < case[3] * case[0]] for case in cases],
    }


if __name__ == "__main__":
    from pathlib import Path

    from regenerate import build

    print(build(Path(__file__)), end="")
