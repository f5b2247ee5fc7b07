"""The diagnosis: what a probe's answer is, and when a mistake is named."""

import math
import time
from dataclasses import replace

import pytest
import torch

from harness import diagnosis
from harness.diagnosis import Known, name
from harness.probe import Probe, agree, answer, simplified

RIGHT = {"one": [["x", [1.0, 2.0]]], "two": [["y", [3.0, 4.0]]], "three": [["z", ["kept"]]]}
TOLERANCES = dict.fromkeys(RIGHT, 1e-6)
AXIS = Known(["axis"], "rows are columns", "look at the axis", {"one": [["x", [2.0, 1.0]]]})
SIGN = Known(["sign"], "up is down", "minus", {"two": [["y", [-3.0, -4.0]]]})
BOTH = Known(
    ["both"], "all", "all", {"one": [["x", [2.0, 1.0]]], "two": [["y", [-3.0, -4.0]]]}
)
CRASH = Known(["crash"], "it fits", "no", {"three": [["raises TypeError", ["no such thing"]]]})
KNOWN = [AXIS, SIGN, CRASH]


def named(found, known=KNOWN):
    said = name(RIGHT, known, {**RIGHT, **found}, TOLERANCES)
    return said.ids, said.exact


# --- when a mistake is named ----------------------------------------------------------------------


def test_nothing_is_wrong():
    assert named({}) == ([], False)


def test_the_mistake_that_explains_all():
    assert named({"one": [["x", [2.0, 1.0]]]}) == (["axis"], True)
    assert named({"one": [["x", [2.0, 1.0 + 1e-7]]]}) == (["axis"], True)


def test_another_value_is_not_named():
    assert named({"one": [["x", [2.0, 1.1]]]}) == ([], False)
    assert named({"one": [["x", [2.0, "nan"]]]}) == ([], False)


def test_two_at_once():
    found = {"one": [["x", [2.0, 1.0]]], "two": [["y", [-3.0, -4.0]]]}
    assert named(found) == (["axis", "sign"], False)
    assert named(found, [*KNOWN, BOTH]) == (["both"], True)


def test_one_and_something_unknown():
    found = {"one": [["x", [2.0, 1.0]]], "two": [["y", [8.0, 8.0]]]}
    assert named(found) == (["axis"], False)
    assert named(found, [BOTH]) == ([], False)  # one of its probes gives something else


def test_what_explains_more_goes_before_its_part():
    found = {"one": [["x", [2.0, 1.0]]], "two": [["y", [-3.0, -4.0]]], "three": [["z", ["lost"]]]}
    assert named(found, [AXIS, SIGN, BOTH]) == (["both"], False)


def test_what_does_not_explain_the_rung_shown_is_elsewhere():
    """It is there, but mending it leaves the rung red: it must not look like the cause."""
    axis = replace(AXIS, rungs=["test_shape", "test_any_input"])
    sign = replace(SIGN, rungs=["test_gradient"])
    both = {**RIGHT, "one": [["x", [2.0, 1.0]]], "two": [["y", [-3.0, -4.0]]]}

    def facts(found, rung):
        return name(RIGHT, [sign, axis], found, TOLERANCES, rung).facts

    assert facts(both, "test_shape") == [
        ("you assumed", "(at least this) rows are columns"),
        ("in fact", "look at the axis"),
    ]
    assert facts(both, "test_cost") == [("elsewhere", "(gradient) up is down")]
    alone = {**RIGHT, "two": [["y", [-3.0, -4.0]]]}  # no probe sees what else is wrong
    assert facts(alone, "test_cost") == [("elsewhere", "(gradient) up is down")]
    assert facts(alone, "test_gradient") == [("you assumed", "up is down"), ("in fact", "minus")]
    assert len(facts(both, "")) == 4  # nothing is shown: nothing is left out


def test_the_same_words_are_said_once():
    twin = replace(SIGN, ids=["twin"], misconception="down is up", tutor=AXIS.tutor)
    found = {**RIGHT, "one": [["x", [2.0, 1.0]]], "two": [["y", [-3.0, -4.0]]]}
    said = [label for label, _ in name(RIGHT, [AXIS, twin], found, TOLERANCES).facts]
    assert said == ["you assumed", "in fact", "you assumed"]


def test_an_exception_alone_is_weak():
    """Other bugs raise a TypeError too: the message has to be the same, and nothing else wrong."""
    same = {"three": [["raises TypeError", ["no such thing"]]]}
    assert named(same) == (["crash"], True)
    assert named({"three": [["raises TypeError", ["another thing"]]]}) == ([], False)
    assert named({**same, "two": [["y", [8.0, 8.0]]]}) == ([], False)


def test_beside_numbers_the_message_of_an_exception_does_not_count():
    mixed = Known(["mixed"], "", "", {**AXIS.gives, **CRASH.gives})
    found = {"one": [["x", [2.0, 1.0]]], "three": [["raises TypeError", ["in other words"]]]}
    assert named(found, [mixed]) == (["mixed"], True)


def test_what_is_not_written_yet_counts_neither_way():
    assert named({"one": [["x", [2.0, 1.0]]], "two": None}, [BOTH]) == (["both"], True)
    assert named({"one": None, "two": None}, [BOTH]) == ([], False)


# --- answers --------------------------------------------------------------------------------------


def test_tensors_numbers_and_facts():
    value = {
        "t": torch.tensor([[1.5, math.nan], [math.inf, -math.inf]]),
        "n": torch.tensor(2.0),
        "list": [1, True, "kept"],
        "nothing": None,
        "sparse": torch.sparse_coo_tensor([[1]], [2.0], (3,), check_invariants=True),
    }
    assert simplified(value) == [
        ["t float32 [2, 2]", [1.5, "nan", "inf", "-inf"]],
        ["n", [2.0]],
        ["list [3]", [1, True, "kept"]],
        ["nothing", [None]],
        ["sparse float32 [3]", [0.0, 2.0, 0.0]],
    ]


def test_a_float_and_a_0_dim_tensor_are_the_same_answer():
    assert simplified({"loss": 2.0}) == simplified({"loss": torch.tensor(2.0)})


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (torch.tensor([1.0, 1000.0005]), True),  # of the largest magnitude
        (torch.tensor([1.002, 1000.0]), False),
        (torch.tensor([1.0, 1000.0], dtype=torch.float64), False),
        (torch.tensor([[1.0, 1000.0]]), False),
        (torch.tensor([1.0, math.nan]), False),
    ],
)
def test_agreement(other, equal):
    one = simplified(torch.tensor([1.0, 1000.0]))
    assert agree(one, simplified(other), 1e-6) is equal


def test_rounding_beside_numbers_is_no_difference():
    """A gradient that cancels is not 0 but 1e-16, and another such number on each processor."""

    def given(rest, dtype=torch.float64):
        return simplified({"out": torch.tensor([0.5]), "gradient": torch.tensor(rest, dtype=dtype)})

    assert agree(given([0.0, 2e-16]), given([-7e-16, 0.0]), 1e-6)
    assert not agree(given([0.0, 2e-11]), given([0.0, 3e-11]), 1e-6)
    assert not agree(given([2e-16], torch.float32), given([3e-16], torch.float32), 1e-6)


def test_an_exception_is_an_answer():
    def ask():
        raise ValueError("no <object at 0x7f00aa>")

    assert answer(Probe("p", ask, 1e-6)) == [["raises ValueError", ["no <object at 0x>"]]]


def test_a_stub_gives_no_answer():
    def ask():
        raise NotImplementedError("kata 01: write f in src/recsys/models/embedding.py")

    assert answer(Probe("p", ask, 1e-6)) is None


def test_the_same_random_numbers_each_time():
    p = Probe("p", lambda: torch.rand(3), 1e-6)
    assert answer(p) == answer(p)


def test_the_alarm_counts_cpu_time_and_ends_waiting_too():
    """On a busy machine the same work takes longer on the wall: that must not silence anything."""

    def spin():
        while True:
            pass

    with diagnosis.alarm(0.2, waited=60.0) as late:
        time.sleep(0.5)
        assert not late
        with pytest.raises(TimeoutError):
            spin()
    assert late
    with diagnosis.alarm(60.0, waited=0.2) as late, pytest.raises(TimeoutError):
        time.sleep(60.0)
    assert late
