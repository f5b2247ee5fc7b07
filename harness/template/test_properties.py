"""Kata NN: what holds for any input."""

import torch

from harness.spec import assert_close, device, given, learner, rung

part = learner("MODULE")


@rung(hint="The mean moves with the rows.")
@given(
    lambda st: {
        "rows": st.integers(1, 7),
        "width": st.integers(1, 5),
        "shift": st.floats(-500, 500),
    }
)
def test_a_shift_changes_nothing(rows, width, shift):
    """Adding the same number to all rows gives the same result."""
    x = torch.arange(rows * width, dtype=torch.float64, device=device()).reshape(rows, width).sin()
    out = part.centre(x + shift)
    assert_close(out, part.centre(x), rtol=0, atol=1e-9, what=f"shift {shift}")
