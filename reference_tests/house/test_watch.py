"""`kata watch`: a verdict now and on each save, in the terminal and without one."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from harness import message, warm
from harness.diagnosis import Diagnosis
from harness.watch import summary

RIGHT = "import math\n\n\ndef scale(x, *, factor=2):\n    if not math.isfinite(factor):\n"
RIGHT += '        raise ValueError("factor")\n    return x * factor\n\n\n'
RIGHT += "def total(values):\n    return sum(values)\n"


class Watching:
    """A `kata watch` that runs; its output is read as it comes."""

    def __init__(self, checkout, *options):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness", "watch", *options],
            cwd=checkout.root,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text = ""

    def until(self, pattern, seconds=90):
        """What came until the pattern did; it is taken away."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end and self.process.poll() is None, self.text
            self.text += (self.process.stdout.read() or b"").decode()
            time.sleep(0.01)
        said, self.text = self.text[: found.end()], self.text[found.end() :]
        return said

    def press(self, keys):
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()


@pytest.fixture
def watching():
    begun = []

    def start(*arguments):
        begun.append(Watching(*arguments))
        return begun[-1]

    yield start
    for each in begun:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize("options", [(), ("--poll",), ("--cold",)], ids=["told", "poll", "cold"])
def test_a_verdict_now_and_on_each_save(checkout, watching, options):
    watch = watching(checkout, "01", *options)
    said = watch.until(r"01_scale is red: 0 of 4 rungs, .* s, \d\d:\d\d:\d\d\n")
    assert "write scale in src/recsys/models/scale.py" in said and "+2 red, same cause" in said
    checkout.scale.write_text(RIGHT.replace("x * factor", "x + factor"))
    said = watch.until(r"01_scale is red: 2 of 4")
    assert "came back    23 (int)" in said and "+1 red: factor" in said
    assert "next:" not in said  # a save is
    checkout.scale.write_text(RIGHT)
    assert "next: r for a review" in watch.until(r"01_scale passes: 4 of 4")
    checkout.scale.write_text(RIGHT + "def (\n")
    assert "SyntaxError" in watch.until(r"01_scale is red: 0 of 4")
    watch.press("q")
    assert watch.process.wait(10) == 0
    assert re.search(r"01 Scale +red +0/4", checkout.kata().out)


def test_the_diagnosis_stands_before_the_other_rungs():
    """It belongs to the rung above it; other rungs come last, cut to the screen."""
    kata = SimpleNamespace(id="01_scale")
    reds = [message.Red("01_scale", f"test_{'long' * 9}_{i}", i, cause=str(i)) for i in range(4)]
    for red in reds:
        red.facts = [("came back", "1")]
    found = Diagnosis(["twice"], facts=[("you assumed", "it is"), ("in fact", "it is not")])
    result = SimpleNamespace(reds=reds, diagnosis=found, reason="", ok=False, passed=0, rungs={})
    lines = summary(kata, result, reds[:1], 0.1)
    assert [line[:9] for line in lines[:4]] == ["  you ass", "  in fact", "", "+3 red: l"]
    assert max(map(len, lines)) <= 80


def test_a_touched_file_is_no_save(checkout, watching):
    watch = watching(checkout, "01")
    watch.until(r"is red: 0 of 4")
    checkout.scale.write_text(checkout.scale.read_text())
    time.sleep(1)
    checkout.spec.write_text(checkout.spec.read_text() + "\n# a remark\n")
    watch.until(r"is red: 0 of 4")  # the spec counts
    time.sleep(0.5)
    watch.text += (watch.process.stdout.read() or b"").decode()
    assert "is red" not in watch.text


def test_keys(checkout, watching):
    checkout.solve()
    watch = watching(checkout)
    watch.until(r"01_scale passes: 4 of 4")
    watch.press("n")
    watch.until(r"02_shift is red: 0 of 1")
    watch.press("h")
    assert "Add 1." in watch.until(r"hint 1 of 1\n.*\n")
    watch.press("s")
    assert "not passing yet" in watch.until(r"--spoil")
    watch.press("\n")
    watch.until(r"02_shift is red")
    watch.press("q")
    assert watch.process.wait(10) == 0


def test_nothing_left_to_do(checkout):
    checkout.solve()
    shift = checkout.root / "src/recsys/models/shift.py"
    shift.write_text("def shift(x):\n    return 2 * x + 1\n")
    assert checkout.kata("test").code == 0
    done = checkout.kata("watch")
    assert done.code == 0 and "All katas pass" in done.out, done


def test_the_first_red_rung_is_shown_before_the_run_has_ended(checkout, watching):
    if not warm.available():
        pytest.skip("this system cannot fork")
    slow = "def total(values):\n    import time\n    time.sleep(3)\n    return sum(values)\n"
    checkout.scale.write_text("def scale(x, *, factor=2):\n    return x + factor\n\n\n" + slow)
    watch = watching(checkout, "01")
    watch.until(r"came back    23 \(int\)")
    begin = time.monotonic()
    watch.until(r"is red: 1 of 4")
    assert time.monotonic() - begin > 1
