"""Kata 04: what holds for cross layers of every shape, on inputs that hypothesis draws."""

from contextlib import nullcontext

import numpy as np
import torch

from harness.spec import assert_close, check, device, generator, given, learner, rung

cross = learner("models.cross")

DTYPES = {"float64": (1e-9, 1e-9), "float32": (1e-4, 1e-5), "bfloat16": (0.1, 0.05)}  # rtol, atol


def drawn(seed, *shape, dtype, scale=1.0):
    values = scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return values.to(device(), dtype)


def by_hand(x0, layers, cotangent):
    """The network in float64, layer after layer and back again: output and gradients."""
    states, inner, found = [x0], [], {}
    for layer in layers:
        w = layer["weight"] if "weight" in layer else layer["u"] @ layer["v"]
        inner.append(states[-1] @ w.T + layer["bias"])
        states.append(x0 * inner[-1] + states[-1])
    grad, grad_x0 = cotangent, 0.0
    for i in reversed(range(len(layers))):
        layer, s = layers[i], grad * x0
        w = layer["weight"] if "weight" in layer else layer["u"] @ layer["v"]
        slope = s.reshape(-1, len(w)).T @ states[i].reshape(-1, len(w))
        found[f"layers.{i}.bias"] = s.reshape(-1, len(w)).sum(0)
        if "weight" in layer:
            found[f"layers.{i}.weight"] = slope
        else:
            found[f"layers.{i}.u"] = slope @ layer["v"].T
            found[f"layers.{i}.v"] = layer["u"].T @ slope
        grad_x0, grad = grad_x0 + grad * inner[i], grad + s @ w
    return states[-1], {**found, "x0": grad_x0 + grad}


def numpy(x):
    return x.detach().cpu().double().numpy()


@rung(
    hints=[
        "Only the last axis is the features; there may be none, one or several in front.",
        "Transpose the matrix, not the input. No .view of a fixed number of axes, no dtype by "
        "name, nothing that writes into an input.",
        "xl @ self.weight.T works for any leading axes; the result is a new tensor",
    ]
)
@given(
    lambda st: {
        "lead": st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 1, 3)]),
        "dim": st.integers(1, 5),
        "rank": st.none() | st.integers(1, 5),
        "depth": st.integers(1, 3),
        "dtype": st.sampled_from(list(DTYPES)),
        "large": st.booleans(),
        "strided": st.booleans(),
        "seed": st.integers(0, 1000),
    },
    examples=25,
)
def test_any_shape_and_dtype(lead, dim, rank, depth, dtype, large, strided, seed):
    """Any leading axes, width, rank and depth, float64 to bfloat16, large and strided inputs."""
    rank = rank and min(rank, dim)
    rtol, atol = DTYPES[dtype]
    options = {"dtype": getattr(torch, dtype)}
    network = cross.CrossNetwork(dim, depth, rank=rank).to(device(), **options)
    parameters = dict(network.named_parameters())
    state = {
        name: drawn(seed + i, *value.shape, **options)
        for i, (name, value) in enumerate(parameters.items())
    }
    network.load_state_dict(state)
    shape = (*lead[:-1], 2 * lead[-1], dim) if strided and lead else (*lead, dim)
    whole = drawn(seed + 50, *shape, scale=1000.0 if large else 1.0, **options)
    x0 = whole[..., ::2, :] if strided and lead else whole
    x0 = x0 + 500 if large and not strided else x0
    before = x0.clone()
    layers = [
        {n.split(".")[2]: numpy(v) for n, v in state.items() if n.startswith(f"layers.{i}.")}
        for i in range(depth)
    ]
    wanted = {"bias", "weight"} if rank is None else {"bias", "u", "v"}
    check(
        all(set(layer) == wanted for layer in layers),
        " and ".join(sorted(wanted)) + " for each layer",
        came_back=sorted(state),
        call=f"CrossNetwork({dim}, {depth}, rank={rank}).state_dict()",
    )
    cotangent = drawn(seed + 60, *before.shape, **options)
    out, grads = by_hand(numpy(before), layers, numpy(cotangent))
    with torch.no_grad() if seed % 2 else nullcontext():
        x = x0 if seed % 2 else x0.detach().requires_grad_()
        y = network(x)
    size = np.abs(out).max(initial=0.0)
    assert_close(y, out, like=x0, call="network(x0)", rtol=rtol, atol=atol * max(1.0, size))
    assert_close(x0, before, what="x0 afterwards: not changed", call="network(x0)")
    if seed % 2 or dtype == "bfloat16":  # three digits: gradients of a depth of 3 lose them
        return
    inputs = {"x0": x, **parameters}
    found = torch.autograd.grad((y * cotangent).sum(), list(inputs.values()))
    for (name, value), grad in zip(inputs.items(), found, strict=True):
        size = np.abs(grads[name]).max(initial=0.0)
        assert_close(
            grad, grads[name], like=value, rtol=rtol, atol=atol * max(1.0, size),
            what=f"gradient of {name}", call="(network(x0) * cotangent).sum().backward()",
        )
