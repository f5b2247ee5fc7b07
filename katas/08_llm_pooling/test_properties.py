"""Kata 08: what pooling gives for any mask, against the definition token by token."""

import torch

from harness.spec import assert_close, check, device, generator, given, learner, rung

text = learner("models.text")


def inputs(st):
    """Sizes and types; which tokens are real is drawn from the seed."""
    return {
        "rows": st.integers(1, 4),
        "length": st.sampled_from([1, 2, 5, 7, 300]),
        "width": st.integers(1, 3),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        "kind": st.sampled_from([torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64]),
        "scale": st.sampled_from([1.0, 1000.0, 1e-3]),
        "padding": st.sampled_from([0.0, 6e4, float("nan"), float("inf"), -float("inf")]),
        "seed": st.integers(0, 99),
    }


@rung(
    hints=[
        "The example below is the smallest one found that goes wrong: do it on paper. padding is "
        "what hidden holds where nothing is real.",
        "Small integer types overflow, booleans do not subtract, bfloat16 has three digits, and "
        "NaN * 0 is NaN.",
        "real = mask.bool(); hidden.masked_fill(~real.unsqueeze(-1), 0.0) instead of a product; "
        "sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32)).",
    ]
)
@given(inputs, examples=25)
def test_pool_any_mask(rows, length, width, dtype, kind, scale, padding, seed):
    """Any mask, its padding full of anything, in any type: pooled in float32 at least."""
    g = generator(seed)
    real = (torch.rand(rows, length, generator=g) < 0.6).to(device())
    values = (torch.randn(length, rows, width, generator=g) + 4).to(device()) * scale
    values = values.to(dtype).transpose(0, 1)  # not contiguous
    hidden = torch.where(real.unsqueeze(-1), values, padding).requires_grad_()
    mask, exact = real.to(kind), values.double()
    before = mask.clone(), hidden.detach().clone()
    cotangent = torch.randn(rows, width, generator=g, dtype=torch.float64).to(device())
    wide = torch.promote_types(dtype, torch.float32)
    for mode in ("mean", "cls", "last"):
        call = f"pool(hidden[{rows}, {length}, {width}], mask, {mode!r})"
        wanted = torch.zeros(rows, width, dtype=torch.float64, device=device())
        slope = torch.zeros(rows, length, width, dtype=torch.float64, device=device())
        for row in range(rows):
            places = real[row].nonzero().flatten().tolist()
            places = {"mean": places, "cls": places[:1], "last": places[-1:]}[mode]
            if places:
                wanted[row] = exact[row, places].mean(0)
                slope[row, places] = cotangent[row] / len(places)
        vector = text.pool(hidden, mask, mode)
        assert_close(vector, wanted, dtype=wide, call=call,
                     rtol=1e-12 if dtype == torch.float64 else 1e-5)  # fmt: skip
        check(vector.requires_grad, "a result that gradients flow through", call=call)
        (gradient,) = torch.autograd.grad(vector, hidden, cotangent.to(wide))
        assert_close(gradient, slope, dtype=dtype, call=call, what="gradient of hidden",
                     rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)  # fmt: skip
        check(torch.equal(mask, before[0]), "a mask that is not changed", call=call)
        same = torch.equal(hidden.detach().nan_to_num(7.0), before[1].nan_to_num(7.0))
        check(same, "hidden that is not changed", call=call)
