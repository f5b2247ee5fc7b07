"""The board and `kata status --json`."""

import json
import os
import re
from datetime import date

import pytest

from harness import plan
from harness.errors import UsageError
from harness.paths import ROOT


def status(checkout):
    run = checkout.kata("status", "--json")
    assert run.code == 0 and not run.err, run
    return json.loads(run.out)


def states(checkout):
    return [(kata["state"], kata["passed"], kata["total"]) for kata in status(checkout)["katas"]]


def test_states_of_a_kata(checkout):
    assert states(checkout) == [("not_started", 0, 4), ("not_started", 0, 1)]
    text = checkout.scale.read_text()
    checkout.scale.write_text(text + "# begun\n")
    assert states(checkout)[0] == ("stale", 0, 4)
    checkout.kata("test", "01")
    assert states(checkout)[0] == ("failing", 0, 4)
    checkout.solve()
    assert states(checkout)[0] == ("stale", 0, 4)
    checkout.kata("test", "01")
    assert states(checkout)[0] == ("passing", 4, 4)
    with open(checkout.spec, "a") as spec:
        spec.write("\n\n@rung(hint='')\ndef test_more():\n    assert models.total([]) == 0\n")
    assert states(checkout)[0] == ("stale", 4, 5)
    checkout.kata("reset", "01")
    assert states(checkout)[0] == ("not_started", 0, 5)
    checkout.scale.unlink()
    assert states(checkout)[0] == ("not_started", 0, 5), "missing is never shown as green"


def test_the_keys_are_fixed(checkout):
    toml = checkout.root / "katas/02_shift/kata.toml"
    toml.write_text(toml.read_text().replace('"core"', '"advanced"'))
    checkout.solve()
    checkout.kata("test", "01")
    assert status(checkout) == {
        "passing": 1,
        "total": 1,
        "katas": [
            {"id": "01_scale", "track": "core", "state": "passing", "passed": 4, "total": 4},
            {"id": "02_shift", "track": "advanced", "state": "not_started"}
            | {"passed": 0, "total": 1},
        ],
    }


def test_the_board(checkout):
    lines = checkout.kata().out.splitlines()
    assert lines[0] == "0 of 2 katas passing, 0 of 2 hours"
    assert lines[-1] == "next: write src/recsys/models/scale.py, then: kata test 01"
    checkout.solve()
    assert "next: kata test 01" in checkout.kata().out
    checkout.kata("test", "01")
    lines = checkout.kata().out.splitlines()
    assert lines[0] == "1 of 2 katas passing, 1 of 2 hours" and "shift.py" in lines[-1]
    assert max(map(len, lines)) <= 80


TODAY = date(2026, 3, 2)


@pytest.mark.parametrize(
    "text, line",
    [
        ("", "20 hours left, 5 a week: done by 2026-03-30"),
        ("hours_a_week = 7.5", "20 hours left, 7.5 a week: done by 2026-03-23"),
        ("deadline = 2026-03-30", "20 hours left, 5 a week: 2026-03-30 takes 5.0 a week"),
        ("deadline = 2026-03-16", "20 hours left, 5 a week: 2026-03-16 takes 10.0 a week"),
        ("deadline = 2026-03-04", "20 hours left, 5 a week: 2026-03-04 takes 20.0 a week"),
        ("deadline = 2026-03-02", "20 hours left, 5 a week: due today"),
        ("deadline = 2026-03-01", "20 hours left, 5 a week: the deadline was 2026-03-01"),
        ("hours_a_week = 0.001", "20 hours left, 0.001 a week: 20000 weeks"),
    ],
)
def test_what_a_plan_comes_to(tmp_path, text, line):
    file = tmp_path / "plan.toml"
    file.write_text(text)
    assert plan.read(file).line(20, TODAY) == line


@pytest.mark.parametrize(
    "text, said",
    [
        ("hours_a_week = 0", "hours_a_week is 0; expected a number above 0"),
        ("hours_a_week = nan", "hours_a_week is nan; expected a number above 0"),
        ("hours_a_week = true", "hours_a_week is True; expected a number"),
        ("deadline = '2026-03-30'", "deadline is '2026-03-30'; expected a day without quotes"),
        ("deadline = 2026-03-30T10:00:00", "expected a day without quotes"),
        ("hours = 4", "unknown 'hours'; expected hours_a_week and deadline"),
        ("hours_a_week =", "cannot be read"),
    ],
)
def test_a_plan_that_is_none(tmp_path, text, said):
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=re.escape(said)):
        plan.read(file)


def test_the_board_shows_the_plan(checkout):
    assert "2 hours left, 5 a week: done by 20" in checkout.kata().out.splitlines()[1]
    (checkout.root / "progress").mkdir(exist_ok=True)
    file = checkout.root / "progress/plan.toml"
    file.write_text("hours_a_week = 3\ndeadline = 2000-01-01\n")
    assert checkout.kata().out.splitlines()[1].endswith("3 a week: the deadline was 2000-01-01")
    file.write_text("hours_a_week = 'x'\n")
    run = checkout.kata()
    assert run.code == 2 and "progress/plan.toml: hours_a_week is 'x'" in run.err, run


def test_advanced_katas_stand_apart(checkout):
    """They count neither as katas nor as hours, and come after the core whatever their number."""
    toml = checkout.root / "katas/01_scale/kata.toml"
    toml.write_text(toml.read_text().replace('"core"', '"advanced"'))
    lines = checkout.kata().out.splitlines()
    assert lines[0] == "0 of 1 katas passing, 0 of 1 hours"
    shown = [line.split()[:2] for line in lines if line.startswith(("  0", "Adv"))]
    assert shown == [["02", "Shift"], ["Advanced,", "beyond"], ["01", "Scale"]]
    assert "next: write src/recsys/models/shift.py" in lines[-1]
    checkout.solve()
    checkout.kata("test", "01")
    lines = checkout.kata().out.splitlines()
    assert lines[0] == "0 of 1 katas passing, 0 of 1 hours" and "shift.py" in lines[-1]


def test_a_kata_that_shows_something_says_so_until_the_next_one_passes(checkout):
    toml = checkout.root / "katas/01_scale/kata.toml"
    toml.write_text(toml.read_text().replace("[files]", 'shows = "films"\n[files]', 1))
    assert "kata run" not in checkout.kata().out
    checkout.solve()
    checkout.kata("test", "01")
    assert checkout.kata().out.splitlines()[-2] == "see it: kata run    films"
    answer = checkout.root / "reference_tests/solution/recsys/models/shift.py"
    (checkout.root / "src/recsys/models/shift.py").write_text(answer.read_text())
    checkout.kata("test", "02")
    assert "kata run" not in checkout.kata().out


def test_an_unreadable_record_is_said_and_the_board_shown(checkout):
    (checkout.root / ".kata").mkdir(exist_ok=True)
    (checkout.root / ".kata/record.json").write_text("{")
    run = checkout.kata()
    assert run.code == 0 and "cannot be read" in run.err and "0 of 2" in run.out, run


def cpu_seconds():
    """Of the children so far: other than time on the wall, it does not depend on who else runs."""
    used = os.times()
    return used.children_user + used.children_system


@pytest.mark.parametrize("command", [[], ["status", "--json"]])
def test_no_torch_and_instant(checkout, command):
    """In the real checkout: what is imported, and how much CPU time the best of five takes.

    A core that is shared makes CPU time longer too, so a bare Python beside it sets the scale.
    """
    code = (
        "import sys; sys.argv[1:] = %r; from harness.cli import main; main(); "
        "print(*sys.modules, file=sys.stderr)"
    )
    run = checkout.python("-c", code % (command,), cwd=ROOT)
    loaded = {name.partition(".")[0] for name in run.err.split()}
    assert run.code == 0 and "harness" in loaded
    assert not loaded & {"torch", "numpy", "pandas", "rich", "libcst", "recsys", "pytest"}, loaded
    seconds, bare = [], []
    for _ in range(5):
        for taken, arguments in ((seconds, ("-m", "harness", *command)), (bare, ("-c", "pass"))):
            begin = cpu_seconds()
            checkout.python(*arguments, cwd=ROOT)
            taken.append(cpu_seconds() - begin)
    assert min(seconds) < max(0.3, 12 * min(bare)), (seconds, bare)
