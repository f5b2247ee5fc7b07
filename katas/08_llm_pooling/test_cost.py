"""Kata 08: pooling and projection at scale, counted; and that they stay on their device."""

import torch

from harness.spec import (
    assert_budget,
    assert_device_safe,
    assert_no_sync,
    assert_scales,
    device,
    learner,
    rung,
)

text = learner("models.text")

MODES = ("mean", "cls", "last")


def make(rows, length, width, place):
    """Hidden states, and a mask with padding on either side and a row of nothing else."""
    number = torch.arange(rows * length * width, device=place)
    hidden = (number % 13 * 0.1).reshape(rows, length, width).requires_grad_()
    column = torch.arange(length, device=place)
    row = torch.arange(rows, device=place).unsqueeze(1)
    return hidden, ((column >= row % 3) & (column < length - row % 4) & (row != 1)).long()


@rung(
    hints=[
        "What happens for each text or token, and what once? What would a GPU have to wait for?",
        "hidden[mask], `if mask.any()`, .item() and a Python loop over rows all ask the device for "
        "an answer. torch.arange makes its numbers on the CPU unless you say where.",
        "Weights belong on the rows: (x * w[:, None]).T @ x needs no diagonal matrix of (n, n).",
    ]
)
def test_at_scale():
    """No loop, no waiting for the device, nothing larger than needed, all on one device."""
    for mode in MODES:
        call = f"pool(hidden, mask, {mode!r})"
        for what, shape in [("texts", lambda n: (n, 5, 3)), ("tokens", lambda n: (4, n, 3))]:

            def pooled(n, mode=mode, shape=shape):
                hidden, mask = make(*shape(n), device())
                return lambda: text.pool(hidden, mask, mode).sum().backward()

            assert_scales(pooled, (8, 64), allowance=16, call=call, what=f"more {what}")
        hidden, mask = make(4, 300, 3, device())
        assert_budget(lambda h=hidden, m=mask, p=mode: text.pool(h, m, p), call=call,
                      largest=4 * 300 * 3 * 8, why="hidden in float64")  # fmt: skip

    def numbered(n):
        mask = make(n, n, 1, device())[1]
        return lambda: text.position_ids(mask)

    assert_scales(numbered, (8, 64), allowance=16, call="position_ids(mask[n, n])")

    def forward(place):
        hidden, mask = make(6, 5, 3, place)
        return lambda: [text.position_ids(mask), *(text.pool(hidden, mask, m) for m in MODES)]

    assert_no_sync(forward, call="position_ids(mask), pool(hidden, mask, mode) on a GPU")
    x, y = make(3000, 4, 2, device())[0].detach().flatten(1), torch.ones(3000, 3, device=device())
    assert_budget(lambda: text.TextProjection.fit(x, y, ridge=1.0, sample_weight=y[:, 0]),
                  largest=8 * 8 * 3000 * 8, why="8 * n * width float64, far below n * n",
                  call="TextProjection.fit(text[3000, 8], target[3000, 3], ...)")  # fmt: skip

    def scenario(place):
        hidden, mask = make(6, 5, 3, place)
        vectors = [text.pool(hidden, mask, mode) for mode in MODES]
        fitted = text.TextProjection.fit(vectors[0], vectors[1], ridge=1.0,
                                         sample_weight=mask.sum(1))  # fmt: skip
        new = fitted(vectors[2])
        new.sum().backward()
        return {"vectors": vectors, "positions": text.position_ids(mask),
                "projection": list(fitted.state_dict().values()), "new": new,
                "gradient": hidden.grad}  # fmt: skip

    assert_device_safe(scenario, call="pool, position_ids and TextProjection on a GPU")
