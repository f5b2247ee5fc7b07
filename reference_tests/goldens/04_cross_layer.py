"""Golden values of kata 04: cross layers and ranking losses, with gradients derived by hand.

With s = cotangent * x0, a layer's gradients are x0: cotangent * (W xl + b), xl: cotangent + W' s,
W: sum of s xl', b: sum of s; U and V follow from W = U V by the chain rule. Central differences
confirm every gradient here.
"""

from __future__ import annotations

import numpy as np

SEED = 404
BATCH, DIM, RANK, LAYERS, LISTS, CANDIDATES = 5, 4, 2, 3, 4, 6


def matrix(layer):
    return layer["weight"] if "weight" in layer else layer["u"] @ layer["v"]


def cross(x0, xl, layer, cotangent):
    """A layer's output, and the gradients of <output, cotangent>: of x0, xl and the layer."""
    w = matrix(layer)
    inner, s = xl @ w.T + layer["bias"], cotangent * x0
    slope = s.T @ xl
    if "weight" in layer:
        grads = {"weight": slope}
    else:
        grads = {"u": slope @ layer["v"].T, "v": layer["u"].T @ slope}
    return x0 * inner + xl, cotangent * inner, cotangent + s @ w, {**grads, "bias": s.sum(0)}


def layer_case(arguments):
    x0, xl, cotangent = (arguments[name] for name in ("x0", "xl", "cotangent"))
    state = {name: arguments[name] for name in arguments if name in ("weight", "u", "v", "bias")}
    out, grad_x0, grad_xl, grads = cross(x0, xl, state, cotangent)
    return {"out": out, "x0": grad_x0, "xl": grad_xl, **grads}


def network_case(arguments):
    x0, cotangent = arguments["x0"], arguments["cotangent"]
    layers = []
    for name in arguments:
        if name.startswith("layers."):
            _, index, key = name.split(".")
            layers += [{}] * (int(index) + 1 - len(layers))
            layers[int(index)] = {**layers[int(index)], key: arguments[name]}
    states = [x0]
    for layer in layers:
        states.append(cross(x0, states[-1], layer, cotangent)[0])
    result, grad_x0, grad = {"out": states[-1]}, 0.0, cotangent
    for index in reversed(range(len(layers))):
        _, more, grad, grads = cross(x0, states[index], layers[index], grad)
        grad_x0 = grad_x0 + more
        result.update({f"layers.{index}.{key}": value for key, value in grads.items()})
    return {**result, "x0": grad_x0 + grad}


def binary_case(arguments):
    z, y = arguments["logits"], arguments["labels"]
    weight = arguments.get("sample_weight", np.ones(len(z)))
    weight = weight / weight.sum()
    loss = np.logaddexp(0, z) - y * z
    return {"loss": weight @ loss, "logits": weight * (1 / (1 + np.exp(-z)) - y)}


def listwise_case(arguments):
    z, y = arguments["logits"], arguments["labels"]
    lists = np.flatnonzero(y.sum(1) > 0)
    loss, grad = 0.0, np.zeros(z.shape)
    for b in lists:
        p = y[b] / y[b].sum()
        softmax = np.exp(z[b]) / np.exp(z[b]).sum()
        loss -= (p * np.log(softmax)).sum() / len(lists)
        grad[b] = (softmax - p) / len(lists)
    return {"loss": loss, "logits": grad}


def confirmed(function, arguments):
    """`function(arguments)`, its gradients held against central differences."""
    expected = function(arguments)
    value_of = "loss" if "loss" in expected else "out"
    cotangent = arguments.get("cotangent", 1.0)
    for name in [key for key in expected if key != value_of]:
        value, step = arguments[name], 1e-6
        slope = np.empty_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * step
                ends.append(np.sum(function({**arguments, name: moved})[value_of] * cotangent))
            slope[index] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(expected[name], slope, rtol=1e-6, atol=1e-7)
    return {"arguments": arguments, "expected": expected}


def golden():
    rng = np.random.default_rng(SEED)

    def draw(*shape):
        return rng.standard_normal(shape).round(3)

    full = {"weight": draw(DIM, DIM), "bias": draw(DIM)}
    low = {"u": draw(DIM, RANK), "v": draw(RANK, DIM), "bias": draw(DIM)}
    inputs = {"x0": draw(BATCH, DIM), "xl": draw(BATCH, DIM), "cotangent": draw(BATCH, DIM)}
    state = {}
    for index in range(LAYERS):
        state[f"layers.{index}.weight"] = (draw(DIM, DIM) / 2).round(3)
        state[f"layers.{index}.bias"] = draw(DIM)
    outer = {name: inputs[name] for name in ("x0", "cotangent")}
    logits = (2 * draw(BATCH)).round(3)
    labels = np.array([1.0, 0.0, 1.0, 0.25, 0.0])
    weight = np.array([0.5, 2.0, 0.0, 1.25, 3.0])
    graded = np.zeros((LISTS, CANDIDATES))
    graded[0, 2], graded[1, [0, 5]], graded[3, [1, 3, 4]] = 1, [1, 1], [3, 0.5, 1]  # 2: none
    return {
        "layer": {
            "full": confirmed(layer_case, {**inputs, **full}),
            "low_rank": confirmed(layer_case, {**inputs, **low}),
        },
        "network": confirmed(network_case, {**outer, **state}),
        "binary": {
            "plain": confirmed(binary_case, {"logits": logits, "labels": labels}),
            "sample_weight": confirmed(
                binary_case, {"logits": logits, "labels": labels, "sample_weight": weight}
            ),
        },
        "listwise": confirmed(
            listwise_case, {"logits": (2 * draw(LISTS, CANDIDATES)).round(3), "labels": graded}
        ),
    }
