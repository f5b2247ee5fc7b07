"""Kata 11: what holds for any batch, with examples that hypothesis chooses."""

import torch

from harness.spec import assert_close, assert_scalar, device, generator, given, learner, rung

sequence = learner("models.sequence")


def defined(states, target, catalogue, temperature, sample, log_q):
    """The docstring's formula, one place after the other; 0 if none has a target."""
    losses = []
    for user, items in zip(states, target, strict=True):
        for state, item in zip(user, items, strict=True):
            if item == 0:
                continue
            drawn = range(len(catalogue)) if sample is None else sample
            candidates = [item - 1, *(j for j in drawn if j != item - 1)]
            scores = catalogue[candidates] @ state / temperature
            if log_q is not None:
                scores = scores - log_q[candidates]
            losses.append(torch.logsumexp(scores, 0) - scores[0])
    return sum(losses) / max(1, len(losses)) + 0 * states.sum()


@rung(
    hints=[
        "Each option works alone; now they meet. The example below says which ones do.",
        "Which places have a target, which candidates a place has, and what is subtracted from "
        "each candidate: three things that do not depend on each other.",
    ]
)
@given(
    lambda st: {
        "target": st.integers(1, 3).flatmap(
            lambda places: st.lists(
                st.lists(st.integers(0, 6), min_size=places, max_size=places),
                min_size=1,
                max_size=4,
            )
        ),
        "sample": st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=5),
        "corrected": st.booleans(),
        "temperature": st.sampled_from([0.05, 0.3, 1.0, 4.0]),
    },
    examples=12,
)
def test_any_batch(target, sample, corrected, temperature):
    """Any batch with any options has the loss of the definition, and its gradients."""
    rows, places = len(target), len(target[0])

    def draw(*shape):
        wide = torch.randn((*shape, 2), generator=generator(sum(shape)), dtype=torch.float64)
        return wide.to(device())[..., 0].requires_grad_()  # not contiguous

    states, catalogue = draw(rows, places, 4), draw(6, 4)
    scale = torch.tensor(temperature, dtype=torch.float64, device=device()).requires_grad_()
    log_q = draw(6).detach().log_softmax(0) if corrected and sample is not None else None
    expected = defined(states, target, catalogue, scale, sample, log_q)
    drawn = None if sample is None else torch.tensor(sample, device=device())
    targets = torch.tensor(target, device=device())
    loss = sequence.next_item_loss(
        states, targets, catalogue, temperature=scale, sample=drawn, log_q=log_q
    )
    assert_scalar(loss, expected.item(), rtol=1e-9, atol=1e-10)
    leaves = {"states": states, "catalogue": catalogue, "temperature": scale}
    slopes = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad, slope in zip(leaves.items(), found, slopes, strict=True):
        slope = torch.zeros_like(leaf) if slope is None else slope
        grad = torch.zeros_like(leaf) if grad is None else grad
        what = f"gradient of the loss with respect to {name}"
        assert_close(grad, slope, rtol=1e-8, atol=1e-8, what=what)
