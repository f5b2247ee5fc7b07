"""The comparisons that kata tests use: what they accept, and what they say."""

import math

import numpy as np
import pytest
import torch

from harness import spec
from harness.message import KataFailure, UnwrittenName
from harness.overlay import OriginError


def facts(compare, *args, **kwargs):
    """The facts of the failure, by label."""
    with pytest.raises(KataFailure) as caught:
        compare(*args, **kwargs)
    return dict(caught.value.facts)


def ramp(*shape, dtype=torch.float32):
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape).to(dtype)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (ramp(2, 3), ramp(2, 3)),
        (ramp(2, 3), ramp(2, 3).numpy()),
        (ramp(2, 3), [[1, 2, 3], [4, 5, 6]]),
        (ramp(2, 3, dtype=torch.int64), ramp(2, 3, dtype=torch.int64)),
        (ramp(2).requires_grad_(), ramp(2)),
        (torch.tensor([math.nan, math.inf]), torch.tensor([math.nan, math.inf])),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
        (torch.tensor([True, False]), [True, False]),
    ],
)
def test_close(actual, expected):
    spec.assert_close(actual, expected)


def test_type_shape_and_dtype_come_before_values():
    wrong = ramp(2, 3) + 100
    assert facts(spec.assert_close, 3.0, ramp(2, 3))["expected"] == "a tensor of shape [2, 3]"
    assert "return" in facts(spec.assert_close, None, ramp(2, 3))["came back"]
    assert facts(spec.assert_close, wrong[:1], ramp(2, 3))["came back"] == "shape [1, 3]"
    found = facts(spec.assert_close, wrong.double(), ramp(2, 3))
    assert (found["came back"], found["expected"]) == ("dtype float64", "dtype float32")


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1), (), (1, 2, 3)])
def test_nothing_is_broadcast(shape):
    found = facts(spec.assert_close, torch.ones(shape), torch.ones(2, 3))
    assert found["expected"] == "shape [2, 3]"
    with pytest.raises(KataFailure):
        spec.assert_close(torch.ones(2, 3), torch.ones(shape))


def test_dtype_may_be_said_apart_from_the_oracle():
    oracle = ramp(3, dtype=torch.float64)
    spec.assert_close(ramp(3), oracle, dtype=torch.float32)
    spec.assert_close(ramp(3), oracle, like=torch.zeros(1))
    assert "dtype" in facts(spec.assert_close, ramp(3), oracle)["came back"]
    assert "dtype" in facts(spec.assert_close, oracle, oracle, like=torch.zeros(1))["came back"]
    meta = torch.zeros(1, device="meta")
    assert facts(spec.assert_close, ramp(3), oracle, like=meta)["expected"].startswith("on meta")


def test_where_and_how_much():
    actual = ramp(2, 3)
    actual[0, 2] += 0.01
    actual[1, 1] += 5
    found = facts(spec.assert_close, actual, ramp(2, 3), rtol=0, atol=1e-3, call="f(x)", what="g")
    assert found["called"] == "f(x)" and found["looked at"] == "g"
    assert found["first at"] == "[0, 2]: 3.01 instead of 3; 2 of 6 values differ"
    assert found["differs"] == (
        "by 5, 5000 times the tolerance (rtol 0, atol 0.001), worst at [1, 1]"
    )
    spec.assert_close(actual, ramp(2, 3), rtol=0, atol=5.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_differs(bad):
    actual = ramp(4)
    actual[2] = bad
    assert facts(spec.assert_close, actual, ramp(4), atol=1e9)["first at"].startswith("[2]")
    assert facts(spec.assert_close, ramp(4), actual, atol=1e9)["first at"].startswith("[2]")
    facts(spec.assert_close, torch.tensor(math.inf), torch.tensor(-math.inf))


def test_a_tolerance_of_zero_means_equal():
    spec.assert_close(ramp(3), ramp(3), rtol=0, atol=0)
    facts(spec.assert_close, torch.nextafter(ramp(3), ramp(3) + 1), ramp(3), rtol=0, atol=0)


NUMBERS = [2.5, torch.tensor(2.5), torch.tensor(2.5).double(), np.float32(2.5)]
OTHERS = [torch.tensor([2.5]), True, None, [2.5], "2.5", torch.tensor(True)]


@pytest.mark.parametrize("value", NUMBERS)
def test_a_number_is_taken_as_float_or_tensor(value):
    spec.assert_scalar(value, 2.5)
    assert facts(spec.assert_scalar, value, 2.6)["expected"] == "2.6"


@pytest.mark.parametrize("value", OTHERS)
def test_what_is_no_number(value):
    facts(spec.assert_scalar, value, 2.5)
    facts(spec.assert_scalar, value, 1.0)


def test_plain_values():
    spec.assert_equal([1, 2], [1, 2])
    assert facts(spec.assert_equal, (1, 2), [1, 2])["came back"] == "(1, 2) (tuple)"
    facts(spec.assert_equal, 1.0, 1)
    spec.check(True, "it holds")
    assert facts(spec.check, torch.tensor(False), "it holds", came_back=3)["expected"] == "it holds"


def test_errors():
    def refuse(error):
        def call():
            raise error

        return call

    cold = refuse(ValueError("Temperature must be above 0"))
    spec.expect_error(cold, ValueError, about="temperature")
    spec.expect_error(refuse(IndexError("row")), (ValueError, IndexError), about=("row", "column"))
    found = facts(spec.expect_error, lambda: 3, ValueError, about="temperature")
    assert found["came back"] == "no error, but 3 (int)"
    assert found["expected"] == "ValueError with a message about temperature"
    found = facts(spec.expect_error, refuse(ValueError("bad")), ValueError, about="temperature")
    assert found["came back"] == "ValueError: bad"
    assert facts(spec.expect_error, refuse(KeyError(3)), ValueError)["came back"] == "KeyError: 3"


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("kata 01: write f in src/recsys/x.py"),
        SyntaxError("no"),
        ImportError("no"),
        UnwrittenName("f", "src/recsys/x.py"),
        OriginError("no"),
    ],
)
def test_code_that_is_not_there_refuses_nothing(error):
    def call():
        raise error

    with pytest.raises(type(error)) as caught:
        spec.expect_error(call, Exception)
    assert caught.value is error


def test_inputs_are_the_same_on_every_device():
    one, two = (torch.randn(3, generator=spec.generator(7)) for _ in range(2))
    assert torch.equal(one, two)


def test_given_imports_hypothesis_when_it_runs(checkout):
    checkout.spec.write_text(
        """import sys
from harness.spec import assert_equal, given, learner, rung

models = learner("models.scale")

@rung(hint="x")
@given(lambda st: {"x": st.integers(-9, 9)}, examples=30)
def test_any(x):
    \"\"\"Twice any number.\"\"\"
    assert_equal(models.scale(x), 2 * x)

assert "hypothesis" not in sys.modules
"""
    )
    red = checkout.pytest("katas/01_scale", "-q")
    assert "write scale in" in red.out and "passed" not in red.out, red
    wrong = "def scale(x, *, factor=2):\n    return x * factor if x < 4 else 0\n"
    checkout.scale.write_text(wrong)
    red = checkout.pytest("katas/01_scale", "-q")
    assert "example      test_any(x=4)" in red.out and "Twice any number." in red.out, red
    green = checkout.pytest("katas/01_scale", "-q", "--impl", "reference")
    assert "1 passed" in green.out, green
