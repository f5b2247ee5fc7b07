"""Golden values of kata 05: the schedule, and a run of AdamW with gradients derived by hand.

The model is ``scale * (x first' + x^2 second') + bias`` with a weighted squared error; every step
takes the mean over all rows of its micro-batches.
"""

from __future__ import annotations

import math

import numpy as np

SEED = 505
ROWS, INPUTS, OUTPUTS = 9, 3, 4
COST = np.array([1.0, 2.0, 0.5, 3.0])
STEPS = [[[0, 1, 2], [3]], [[4, 5, 6, 7, 8]], [[8], [2, 1], [5, 0, 3]], [[6, 7], [1, 2, 0]],
         [[3, 4, 5, 6]], [[7], [8, 0, 1, 2]]]  # fmt: skip
WARMUP, LR, DECAY, BETAS, EPS, LIMIT = 2, 0.05, 0.1, (0.8, 0.95), 1e-3, 20.0


def factor(step, warmup, total):
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step >= total:
        return 0.0
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def loss_and_gradients(params, x, y):
    linear = x @ params["first"].T + x**2 @ params["second"].T
    error = params["scale"] * linear + params["bias"] - y
    slope = 2 * COST * error / len(x)
    return (COST * error**2).sum(1).mean(), {
        "first": params["scale"] * slope.T @ x,
        "second": params["scale"] * slope.T @ x**2,
        "bias": slope.sum(0),
        "scale": np.asarray((slope * linear).sum()),
    }


def trajectory(params, x, y):
    """Rate of, loss before, and parameters after each step."""
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    result = []
    for step, groups in enumerate(STEPS):
        rows = [row for group in groups for row in group]
        loss, grads = loss_and_gradients(params, x[rows], y[rows])
        norm = math.sqrt(sum((grad**2).sum() for grad in grads.values()))
        lr = LR * factor(step, WARMUP, len(STEPS))
        after = {}
        for name, grad in grads.items():
            grad = grad * min(1, LIMIT / norm)
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * grad
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * grad**2
            mean = first[name] / (1 - BETAS[0] ** (step + 1))
            spread = np.sqrt(second[name] / (1 - BETAS[1] ** (step + 1)))
            decay = DECAY if params[name].ndim >= 2 else 0.0
            after[name] = params[name] * (1 - lr * decay) - lr * mean / (spread + EPS)
        params = after
        result.append({"lr": lr, "loss": loss, "params": params})
    return result


def golden():
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((ROWS, INPUTS)).round(2)
    y = rng.standard_normal((ROWS, OUTPUTS)).round(2)
    params = {
        "first": rng.standard_normal((OUTPUTS, INPUTS)).round(2),
        "second": (rng.standard_normal((OUTPUTS, INPUTS)) / 4).round(2),
        "bias": rng.standard_normal(OUTPUTS).round(2),
        "scale": np.asarray(0.7),
    }
    cases = [(0, 5), (3, 10), (1, 4), (4, 4)]
    return {
        "warmup_cosine": [
            {"warmup_steps": warmup, "total_steps": total,
             "expected": [factor(step, warmup, total) for step in range(total + 3)]}
            for warmup, total in cases
        ],
        "run": {
            "x": x, "y": y, "cost": COST, "params": params, "steps": STEPS,
            "lr": LR, "weight_decay": DECAY, "betas": BETAS, "eps": EPS,
            "max_grad_norm": LIMIT, "expected": trajectory(params, x, y),
        },
    }  # fmt: skip


if __name__ == "__main__":
    from pathlib import Path

    from regenerate import build

    print(build(Path(__file__)), end="")
