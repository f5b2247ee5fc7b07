"""Golden values of kata 03: losses and their analytic gradients in float64 NumPy.

The gradient is derived by hand: with p the softmax of a row's scores over its candidates, the row's
loss has the gradient p - onehot with respect to the scores. Central differences confirm it here.
"""

from __future__ import annotations

import numpy as np

SEED = 303
BATCH, WIDTH, CATALOGUE = 5, 3, 7


def softmax_loss(scores, label, allowed):
    """Loss of each row and its gradient with respect to the scores; `allowed` are candidates."""
    scores = np.where(allowed, scores, -np.inf)
    top = scores.max(axis=1, keepdims=True)
    exp = np.exp(scores - top)
    total = exp.sum(axis=1, keepdims=True)
    rows = np.arange(len(scores))
    loss = (np.log(total) + top)[:, 0] - scores[rows, label]
    grad = exp / total
    grad[rows, label] -= 1
    return loss, grad


def in_batch(
    user, item, temperature, item_ids=None, log_q=None, sample_weight=None, symmetric=False
):
    batch = len(user)
    weight = np.ones(batch) if sample_weight is None else sample_weight
    weight = weight / weight.sum()
    ids = np.arange(batch) if item_ids is None else item_ids
    allowed = (ids[:, None] != ids[None, :]) | np.eye(batch, dtype=bool)
    similarity = user @ item.T
    bias = 0 if log_q is None else log_q[None, :]
    diagonal = np.arange(batch)
    loss, grad = softmax_loss(similarity / temperature - bias, diagonal, allowed)
    loss, grad = loss @ weight, grad * weight[:, None]
    if symmetric:
        back, back_grad = softmax_loss(similarity.T / temperature, diagonal, allowed)
        loss = (loss + back @ weight) / 2
        grad = (grad + (back_grad * weight[:, None]).T) / 2
    return result(loss, grad, user, item, "item", temperature)


def full(user, catalogue, target, temperature, sample_weight=None):
    weight = np.ones(len(user)) if sample_weight is None else sample_weight
    weight = weight / weight.sum()
    scores = user @ catalogue.T / temperature
    loss, grad = softmax_loss(scores, target, np.ones(scores.shape, dtype=bool))
    return result(loss @ weight, grad * weight[:, None], user, catalogue, "catalogue", temperature)


def result(loss, grad, rows, columns, name, temperature):
    """The loss and its gradients by argument, from the gradient of <row, column> / temperature."""
    return {
        "loss": loss,
        "user": grad @ columns / temperature,
        name: grad.T @ rows / temperature,
        "temperature": -(grad * (rows @ columns.T)).sum() / temperature**2,
    }


def confirmed(function, arguments):
    """`function(**arguments)`, its gradients held against central differences."""
    expected = function(**arguments)
    for name in [key for key in expected if key != "loss"]:
        value = np.asarray(arguments[name], dtype=np.float64)
        slope = np.empty_like(value)
        step = 1e-6
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * step
                ends.append(function(**{**arguments, name: moved})["loss"])
            slope[index] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(expected[name], slope, rtol=1e-6, atol=1e-7)
    return {"arguments": arguments, "expected": expected}


def golden():
    rng = np.random.default_rng(SEED)
    user = rng.standard_normal((BATCH, WIDTH)).round(3)
    item = (0.6 * user + rng.standard_normal((BATCH, WIDTH))).round(3)
    catalogue = rng.standard_normal((CATALOGUE, WIDTH)).round(3)
    log_q = np.log([0.31, 0.02, 0.11, 0.31, 0.05]).round(4)
    ids = np.array([7, 2, 5, 7, 4])
    weight = np.array([0.5, 2.0, 0.0, 1.25, 3.0])
    pair = {"user": user, "item": item, "temperature": 0.4}
    return {
        "in_batch": {
            "plain": confirmed(in_batch, pair),
            "log_q": confirmed(in_batch, {**pair, "log_q": log_q}),
            "item_ids": confirmed(in_batch, {**pair, "item_ids": ids}),
            "sample_weight": confirmed(in_batch, {**pair, "sample_weight": weight}),
            "symmetric": confirmed(in_batch, {**pair, "symmetric": True}),
            "all": confirmed(
                in_batch,
                {
                    **pair,
                    "item_ids": ids,
                    "log_q": log_q,
                    "sample_weight": weight,
                    "symmetric": True,
                },
            ),
        },
        "full": {
            "plain": confirmed(
                full,
                {
                    "user": user,
                    "catalogue": catalogue,
                    "target": np.array([6, 0, 3, 0, 2]),
                    "temperature": 0.4,
                },
            ),
            "sample_weight": confirmed(
                full,
                {
                    "user": user,
                    "catalogue": catalogue,
                    "target": np.array([6, 0, 3, 0, 2]),
                    "temperature": 0.4,
                    "sample_weight": weight,
                },
            ),
        },
    }
