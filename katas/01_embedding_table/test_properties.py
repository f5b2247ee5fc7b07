"""Kata 01: what holds for any bags, against the definition entry by entry."""

import torch

from harness.spec import assert_close, device, generator, given, learner, rung

embedding = learner("models.embedding")

ROWS, WIDTH = 6, 3
WAYS = ("sum", "mean", "max", "weighted sum", "weighted mean")


def inputs(st):
    """Any bags of (id, weight), any padding row."""
    # eighths add up without rounding: a sum of weights is 0 or clearly not
    entry = st.tuples(st.integers(0, ROWS - 1), st.integers(-8, 16).map(lambda n: n / 8))
    return {
        "bags": st.lists(st.lists(entry, max_size=5), max_size=5),
        "padding_idx": st.sampled_from([None, 0, 2, ROWS - 1]),
        "dtype": st.sampled_from([torch.int64, torch.int32]),
    }


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
@given(inputs, examples=20)
def test_any_bags(bags, padding_idx, dtype):
    """Any bags, with any padding row, are pooled as the docstring defines, gradients too."""
    rows = torch.randn((ROWS, WIDTH), generator=generator(6), dtype=torch.float64).to(device())
    table = embedding.EmbeddingTable(
        ROWS, WIDTH, padding_idx=padding_idx, device=device(), dtype=torch.float64
    )
    table.load_state_dict({"weight": rows})
    starts = [sum(map(len, bags[:b])) for b in range(len(bags))]
    offsets = torch.tensor(starts, dtype=dtype, device=device())
    values = torch.tensor([i for bag in bags for i, _ in bag], dtype=dtype, device=device())
    for way in WAYS:
        weighted, mode = way.startswith("weighted"), way.rpartition(" ")[2]
        given_weights = [w if weighted else 1.0 for bag in bags for _, w in bag]
        weights, leaves = (
            torch.tensor(given_weights, dtype=torch.float64, device=device()).requires_grad_()
            for _ in range(2)
        )
        options = {"mode": mode} | ({"weights": weights} if weighted else {})
        out = table.bag(values, offsets, **options)

        leaf, each = rows.clone().requires_grad_(), iter(leaves)
        entries = [[(i, next(each)) for i, _ in bag] for bag in bags]
        expected = defined(leaf, entries, mode, padding_idx)
        what = f"padding_idx={padding_idx}"
        assert_close(out, expected, what=what)
        if out.numel() == 0:
            continue
        upstream = torch.randn(out.shape, generator=generator(7), dtype=torch.float64)
        upstream, table.weight.grad = upstream.to(device()), None
        (expected * upstream).sum().backward()
        if out.requires_grad:  # not where there is nothing but empty bags
            (out * upstream).sum().backward()
        grad, wanted = (zero_or(x) for x in (table.weight, leaf))
        assert_close(grad, wanted, what=f"gradient of weight, {what}")
        if weighted:
            grad, wanted = (zero_or(x) for x in (weights, leaves))
            assert_close(grad, wanted, what=f"gradient of weights, {what}")


def zero_or(leaf):
    """The gradient of a leaf; zeros where none came."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
