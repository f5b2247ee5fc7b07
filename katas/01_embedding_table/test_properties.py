"""Kata 01: what holds for any bags, against the definition entry by entry."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spec import assert_close, device, generator, learner, rung

embedding = learner("models.embedding")

ROWS, WIDTH = 6, 3
EXAMPLES = settings(max_examples=25, derandomize=True, database=None, deadline=None)

# eighths add up without rounding: a sum of weights is 0 or clearly not
entries = st.tuples(st.integers(0, ROWS - 1), st.integers(-8, 16).map(lambda n: n / 8))
bags_of_entries = st.lists(st.lists(entries, max_size=5), max_size=5)
pooling = st.sampled_from(
    [("sum", False), ("mean", False), ("max", False), ("sum", True), ("mean", True)]
)


def defined(weight, bags, mode, padding_idx):
    """The docstring's formula, one bag and one entry after the other."""
    out = []
    for bag in bags:
        real = [(weight[i], w) for i, w in bag if i != padding_idx]
        total = sum(w for _, w in real)
        if not real or (mode == "mean" and total == 0):
            out.append(weight[0] * 0)
        elif mode == "max":
            out.append(torch.stack([row for row, _ in real]).amax(0))
        else:
            out.append(sum(row * w for row, w in real) / (total if mode == "mean" else 1))
    return torch.stack(out) if out else weight[:0] * 0


@rung(
    hints=[
        "The example below is the smallest one found that goes wrong: do it on paper.",
        "Bags may be empty in front, in between and at the end; an id may come twice; without a "
        "padding row every id is an entry, 0 as well.",
        "Weights may cancel in a mean: zeros, and no gradient, to the weights neither.",
    ]
)
def test_any_bags():
    """Any bags, with any padding row, are pooled as the docstring defines, gradients too."""
    rows = torch.randn((ROWS, WIDTH), generator=generator(6), dtype=torch.float64).to(device())

    @EXAMPLES
    @given(
        bags=bags_of_entries,
        pool=pooling,
        padding_idx=st.sampled_from([None, 0, 2, ROWS - 1]),
        dtype=st.sampled_from([torch.int64, torch.int32]),
    )
    def holds(bags, pool, padding_idx, dtype):
        mode, weighted = pool
        bags = [[(i, w if weighted else 1.0) for i, w in bag] for bag in bags]
        table = embedding.EmbeddingTable(
            ROWS, WIDTH, padding_idx=padding_idx, device=device(), dtype=torch.float64
        )
        table.load_state_dict({"weight": rows})
        starts = [sum(map(len, bags[:b])) for b in range(len(bags))]
        offsets = torch.tensor(starts, dtype=dtype, device=device())
        values = torch.tensor([i for bag in bags for i, _ in bag], dtype=dtype, device=device())
        weights = torch.tensor(
            [w for bag in bags for _, w in bag], dtype=torch.float64, device=device()
        ).requires_grad_()
        options = {"mode": mode} | ({"weights": weights} if weighted else {})
        out = table.bag(values, offsets, **options)

        leaf = rows.clone().requires_grad_()
        every = weights.detach().clone().requires_grad_()
        each = iter(every)
        expected = defined(leaf, [[(i, next(each)) for i, _ in b] for b in bags], mode, padding_idx)
        what = f"padding_idx={padding_idx}"
        assert_close(out, expected, what=what)
        if not out.numel():
            return
        upstream = torch.randn(out.shape, generator=generator(7), dtype=torch.float64).to(device())
        (expected * upstream).sum().backward()
        (out * upstream).sum().backward()
        zeros = torch.zeros_like
        assert_close(table.weight.grad, zeros(rows) if leaf.grad is None else leaf.grad, what=what)
        if weighted and len(weights):
            wanted = zeros(every) if every.grad is None else every.grad
            assert_close(weights.grad, wanted, what=f"gradient of weights, {what}")

    holds()
