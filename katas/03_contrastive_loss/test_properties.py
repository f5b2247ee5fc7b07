"""Kata 03: what holds for any batch, against the definition candidate by candidate."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from harness.spec import assert_close, assert_scalar, device, fail, generator, learner, rung

losses = learner("training.losses")

EXAMPLES = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take seconds
)


@st.composite
def batches(draw):
    """Sizes, and the options of a batch; each of them may be left out."""
    rows = draw(st.integers(1, 6))

    def maybe(entry):
        return draw(st.none() | st.lists(entry, min_size=rows, max_size=rows))

    return {
        "rows": rows,
        "width": draw(st.sampled_from([1, 3, 7])),
        "temperature": draw(st.sampled_from([0.05, 0.3, 1.0, 4.0])),
        "item_ids": maybe(st.integers(-1, 3)),
        "log_q": maybe(st.integers(-96, 0).map(lambda n: n / 8)),
        "sample_weight": maybe(st.integers(0, 16).map(lambda n: n / 8)),
        "symmetric": draw(st.booleans()),
    }


def defined(user, item, temperature, item_ids, log_q, sample_weight, symmetric):
    """The docstring's formulas, one row after the other; 0 if no row counts."""
    rows = range(len(user))
    weight = sample_weight or [1.0 for _ in rows]
    total = (user * item).sum() * 0
    for i in rows:
        candidates = [j for j in rows if j == i or not item_ids or item_ids[j] != item_ids[i]]
        own = candidates.index(i)
        items = item[candidates] @ user[i] / temperature
        if log_q:
            items = items - items.new_tensor([log_q[j] for j in candidates])
        loss = torch.logsumexp(items, 0) - items[own]
        if symmetric:
            users = user[candidates] @ item[i] / temperature
            loss = (loss + torch.logsumexp(users, 0) - users[own]) / 2
        total = total + weight[i] * loss
    return total / (sum(weight) or 1.0)


@rung(
    hints=[
        "Each option works alone; now they meet. The example below says which ones do.",
        "Weights act on rows after the row losses, in both directions; the mask acts on both "
        "directions; log_q on one.",
    ]
)
def test_any_batch():
    """Any batch with any options has the loss of the definition, and its gradients."""

    @EXAMPLES
    @given(batch=batches())
    def holds(batch):
        options = dict(batch)
        rows, width = options.pop("rows"), options.pop("width")
        wide = torch.randn((rows, 2 * width), generator=generator(5), dtype=torch.float64)
        wide = wide.to(device())  # its halves are not contiguous
        user, item = wide[:, :width].requires_grad_(), wide[:, width:].requires_grad_()
        temperature = torch.tensor(options.pop("temperature"), dtype=torch.float64, device=device())
        leaves = {"user": user, "item": item, "temperature": temperature.requires_grad_()}
        expected = defined(**leaves, **options)
        for name in ("log_q", "sample_weight"):
            if options[name] is not None:
                options[name] = torch.tensor(options[name], dtype=torch.float64, device=device())
        if options["item_ids"] is not None:
            options["item_ids"] = torch.tensor(options["item_ids"], device=device())
        loss = losses.in_batch_softmax_loss(user, item, temperature=temperature, **options)
        assert_scalar(loss, expected.item(), rtol=1e-9, atol=1e-10)
        slopes = torch.autograd.grad(expected, list(leaves.values()))
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, grad, slope in zip(leaves, found, slopes, strict=True):
            of = f"gradient of the loss with respect to {name}"
            if grad is None:
                fail(expected="a gradient", came_back="none at all", what=of)
            assert_close(grad, slope, rtol=1e-8, atol=1e-8, what=of)

    holds()
