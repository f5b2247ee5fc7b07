"""Kata NN: what `FILE` must do, from the simplest on."""

import torch

from harness.spec import assert_close, device, expect_error, generator, golden, learner, rung

part = learner("MODULE")


def random(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(device())


@rung(
    hints=[
        "Which axis do the rows lie on?",
        "The mean of all rows has as many values as a row.",
        "x - x.mean(dim=0)",
    ]
)
def test_rows_are_centred():
    """Each column of the result adds up to 0, and differences of rows stay."""
    given = golden("golden.json")
    x = torch.tensor(given["x"], dtype=torch.float64, device=device())
    out = part.centre(x)
    assert_close(out, given["centred"], like=x, rtol=1e-7)  # golden values have 9 digits


@rung(
    hints=[
        "A row of weight 2 counts twice.",
        "Divide by what the weights add up to.",
        "weights @ x / weights.sum()",
    ]
)
def test_weights():
    """With weights the mean is the weighted one, and gradients flow into them."""
    x, weights, upstream = random(5, 3), random(5, seed=1).abs() + 0.1, random(5, 3, seed=2)
    weights.requires_grad_()
    out = part.centre(x, weights=weights)
    share = weights.detach() / weights.detach().sum()
    assert_close(out, x - (share[:, None] * x).sum(0))
    (found,) = torch.autograd.grad((out * upstream).sum(), [weights])
    inner = -(x @ upstream.sum(0))  # d loss / d share
    expected = (inner - (share * inner).sum()) / weights.detach().sum()
    assert_close(found, expected, what="gradient of weights")


@rung(hints=["What has no rows has no mean.", "Look at dim() and len().", "raise ValueError(...)"])
def test_bad_input():
    """Other shapes are refused."""
    for shape in ((3,), (0, 3), (2, 3, 4)):
        expect_error(
            lambda s=shape: part.centre(torch.ones(s)), ValueError, call=f"centre(x{list(shape)})"
        )
    for shape in ((2,), (3, 1)):
        expect_error(
            lambda s=shape: part.centre(random(3, 2), weights=torch.ones(s)),
            ValueError,
            call=f"centre(x[3, 2], weights{list(shape)})",
        )
