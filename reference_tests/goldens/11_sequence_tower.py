"""Golden values of kata 11 in float64 NumPy: attention place by place, as the formulas say it.

Gradients are central differences of fourth order, whose error is far below the last digit written.
"""

from __future__ import annotations

from math import erf, sqrt

import numpy as np

SEED = 1111
BATCH, PLACES, DIM, HEADS, HIDDEN, MOST, ROWS, ITEMS = 2, 4, 6, 2, 5, 7, 9, 8


def attention(x, is_item, state):
    """Each place of each row looks at itself and at the items behind it."""
    dim, heads = x.shape[2], len(state["recency"])
    width = dim // heads
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        parts = x[b] @ state["qkv.weight"].T + state["qkv.bias"]
        for i in range(x.shape[1]):
            seen = [j for j in range(i, x.shape[1]) if j == i or is_item[b][j]]
            for h in range(heads):
                q, k, v = (slice(n * dim + h * width, n * dim + (h + 1) * width) for n in range(3))
                scores = np.array(
                    [
                        parts[i, q] @ parts[j, k] / sqrt(width) + state["recency"][h, j - i]
                        for j in seen
                    ]
                )
                share = np.exp(scores - scores.max())
                share /= share.sum()
                mixed = sum(s * parts[j, v] for s, j in zip(share, seen, strict=True))
                out[b, i, h * width : (h + 1) * width] = mixed
    return out @ state["out.weight"].T + state["out.bias"]


def norm(x, state, name):
    centred = x - x.mean(-1, keepdims=True)
    std = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred / std * state[f"{name}.weight"] + state[f"{name}.bias"]


def inside(state, prefix):
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def block(x, is_item, state):
    x = x + attention(norm(x, state, "norm1"), is_item, inside(state, "attention."))
    up = norm(x, state, "norm2") @ state["up.weight"].T + state["up.bias"]
    up = np.vectorize(lambda z: z * (1 + erf(z / sqrt(2))) / 2)(up)
    return x + up @ state["down.weight"].T + state["down.bias"]


def tower(history, state, num_blocks):
    is_item = np.asarray(history) != 0
    x = state["table.weight"][np.asarray(history)] * sqrt(state["table.weight"].shape[1])
    for index in range(num_blocks):
        x = block(x, is_item, inside(state, f"blocks.{index}."))
    x = norm(x, state, "norm")
    x = x / np.sqrt((x**2).sum(-1, keepdims=True))
    return np.where(is_item[:, :, None], x, 0)


def loss(states, target, catalogue, temperature, sample=None, log_q=None):
    """The mean over all places that have a target of what the docstring defines."""
    losses = []
    for b, i in np.argwhere(np.asarray(target) > 0):
        own = target[b][i] - 1
        drawn = range(len(catalogue)) if sample is None else sample
        scores = [
            states[b, i] @ catalogue[j] / temperature - (0 if log_q is None else log_q[j])
            for j in [own, *(j for j in drawn if j != own)]
        ]
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
    return np.mean(losses)


def gradients(function, given, names):
    """Of `function(given)`, a number, with respect to the arrays of these names."""
    found, step = {}, 2e-3
    for name in names:
        slope = np.zeros(np.shape(given[name]))
        for index in np.ndindex(slope.shape):
            ends = []
            for k in (-2, -1, 1, 2):
                moved = np.array(given[name], dtype=float)
                moved[index] += k * step
                ends.append(function({**given, name: moved}))
            slope[index] = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * step)
        found[name] = slope.round(9)
    return found


def golden():
    rng = np.random.default_rng(SEED)

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).round(3)

    def attention_state(dim, heads):
        return {
            "qkv.weight": draw(3 * dim, dim, scale=0.5),
            "qkv.bias": draw(3 * dim, scale=0.5),
            "out.weight": draw(dim, dim, scale=0.5),
            "out.bias": draw(dim),
            "recency": draw(heads, MOST),
        }

    def block_state(dim, heads):
        state = {f"attention.{key}": value for key, value in attention_state(dim, heads).items()}
        for name in ("norm1", "norm2"):
            state |= {f"{name}.weight": 1 + draw(dim, scale=0.3), f"{name}.bias": draw(dim)}
        state |= {"up.weight": draw(HIDDEN, dim, scale=0.5), "up.bias": draw(HIDDEN)}
        return state | {"down.weight": draw(dim, HIDDEN, scale=0.5), "down.bias": draw(dim)}

    def module_case(function, x, is_item, state, **sizes):
        cotangent = draw(*x.shape)

        def value(given):
            own = {key: given[key] for key in state}
            return (function(given["x"], is_item, own) * cotangent).sum()

        given = {"x": x, **state}
        return {
            **sizes,
            "x": x,
            "is_item": is_item,
            "state": state,
            "cotangent": cotangent,
            "out": function(x, is_item, state),
            "gradients": gradients(value, given, list(given)),
        }

    everywhere = [[True] * 3]
    some = [[True] * PLACES, [True, True, False, False]]
    state = {"table.weight": draw(ROWS, DIM, scale=0.4), "norm.weight": 1 + draw(DIM, scale=0.3)}
    state |= {"norm.bias": draw(DIM)}
    state["table.weight"][0] = 0
    for index in range(2):
        state |= {f"blocks.{index}.{key}": value for key, value in block_state(DIM, HEADS).items()}
    history = [[3, 8, 3, 5], [7, 2, 0, 0], [0, 0, 0, 0]]
    cotangent = draw(3, PLACES, DIM)

    def of_tower(given):
        return (tower(history, given, 2) * cotangent).sum()

    names = ["table.weight", "norm.weight", "norm.bias", "blocks.0.attention.recency"]
    names += ["blocks.0.norm1.weight", "blocks.1.attention.recency", "blocks.1.up.bias"]
    places = {
        "state": state,
        "history": history,
        "cotangent": cotangent,
        "out": tower(history, state, 2),
        "gradients": gradients(of_tower, state, names),
    }
    places["gradients"]["table.weight"][0] = 0  # padding does not learn

    states, catalogue = draw(BATCH, 3, 5), draw(ITEMS, 5)
    target = [[4, 8, 1], [6, 0, 0]]
    chance = rng.dirichlet(np.ones(ITEMS)).round(4)
    options = {
        "full": {"temperature": 0.7},
        "sampled": {"temperature": 0.7, "sample": [2, 5, 2, 7, 0]},
        "log_q": {"temperature": 0.4, "sample": [2, 5, 2, 7, 0], "log_q": np.log(chance).round(4)},
    }
    losses = {}
    for name, option in options.items():
        given = {"states": states, "catalogue": catalogue, "temperature": option["temperature"]}

        def value(given, option=option):
            rest = {key: option[key] for key in option if key != "temperature"}
            return loss(given["states"], target, given["catalogue"], given["temperature"], **rest)

        slopes = gradients(value, given, list(given))
        losses[name] = {"options": option, "loss": value(given), "gradients": slopes}
    return {
        "one_head": module_case(
            attention, draw(1, 3, 4), everywhere, attention_state(4, 1), dim=4, num_heads=1
        ),
        "heads": module_case(
            attention,
            draw(BATCH, PLACES, DIM),
            some,
            attention_state(DIM, HEADS),
            dim=DIM,
            num_heads=HEADS,
        ),
        "block": module_case(
            block,
            draw(BATCH, PLACES, DIM),
            some,
            block_state(DIM, HEADS),
            dim=DIM,
            num_heads=HEADS,
            hidden_dim=HIDDEN,
        ),
        "tower": places,
        "loss": {"states": states, "catalogue": catalogue, "target": target, "cases": losses},
    }
