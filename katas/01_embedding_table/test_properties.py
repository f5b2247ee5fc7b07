"""Kata 01: what holds for any bags, against the definition entry by entry."""

import torch

from harness.spec import assert_close, device, generator, given, learner, rung

embedding = learner("models.embedding")

ROWS, WIDTH = 6, 3


def inputs(st):
    """Any bags of (id, weight), any padding row."""
    # eighths add up without rounding: a sum of weights is 0 or clearly not
    entry = st.tuples(st.integers(0, ROWS - 1), st.integers(-8, 16).map(lambda n: n / 8))
    return {
        "bags": st.lists(st.lists(entry, max_size=5), max_size=5),
        "pooling": st.sampled_from(["sum", "mean", "max", "weighted sum", "weighted mean"]),
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
@given(inputs, examples=25)
def test_any_bags(bags, pooling, padding_idx, dtype):
    """Any bags, with any padding row, are pooled as the docstring defines, gradients too."""
    rows = torch.randn((ROWS, WIDTH), generator=generator(6), dtype=torch.float64).to(device())
    table = embedding.EmbeddingTable(
        ROWS, WIDTH, padding_idx=padding_idx, device=device(), dtype=torch.float64
    )
    table.load_state_dict({"weight": rows})
    weighted, mode = pooling.startswith("weighted"), pooling.rpartition(" ")[2]
    starts = [sum(map(len, bags[:b])) for b in range(len(bags))]
    offsets = torch.tensor(starts, dtype=dtype, device=device())
    entries = [entry for bag in bags for entry in bag]
    values = torch.tensor([i for i, _ in entries], dtype=dtype, device=device())
    weights = torch.tensor([w if weighted else 1.0 for _, w in entries], dtype=torch.float64)
    weights = weights.to(device()).requires_grad_()
    options = {"mode": mode} | ({"weights": weights} if weighted else {})
    out = table.bag(values, offsets, **options)

    leaf, leaves = rows.clone().requires_grad_(), weights.detach().clone().requires_grad_()
    each = iter(leaves)
    expected = defined(leaf, [[(i, next(each)) for i, _ in b] for b in bags], mode, padding_idx)
    what = f"padding_idx={padding_idx}"
    assert_close(out, expected, what=what)
    if out.numel() == 0:
        return
    upstream = torch.randn(out.shape, generator=generator(7), dtype=torch.float64).to(device())
    (expected * upstream).sum().backward()
    if out.requires_grad:  # not where there is nothing but empty bags
        (out * upstream).sum().backward()
    grad, wanted = ((x.grad if x.grad is not None else x * 0) for x in (table.weight, leaf))
    assert_close(grad, wanted, what=f"gradient of weight, {what}")
    if weighted:
        grad, wanted = ((x.grad if x.grad is not None else x * 0) for x in (weights, leaves))
        assert_close(grad, wanted, what=f"gradient of weights, {what}")
