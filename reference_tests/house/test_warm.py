"""The warm runner: runs as in a fresh process, and ends what misbehaves."""

import json

import pytest

from harness import warm

pytestmark = pytest.mark.skipif(not warm.available(), reason="this system cannot fork")

SCRIPT = """
import json, os, sys, time
from pathlib import Path
from harness import catalog, warm
warm.USUAL = ("pytest", "harness.plugin", "harness.spec")
kata = catalog.find("01")
seen = []
with warm.Warm() as warm:
    for body in {bodies!r}:
        text = '''{scale}'''.replace("BODY", body)
        Path("src/recsys/models/scale.py").write_text(text)
        result = warm.run(kata, timeout={timeout})
        seen.append([result.ok, result.passed, result.reason, len(result.reds), result.seconds])
print(json.dumps(seen))
"""
SCALE = """import math, os, subprocess, sys, threading, time
def scale(x, *, factor=2):
    if not math.isfinite(factor):
        raise ValueError("factor")
    BODY
def total(values):
    return sum(values)
"""
GOOD = "return x * factor"


def run(checkout, *bodies, timeout=60):
    done = checkout.python("-c", SCRIPT.format(bodies=bodies, scale=SCALE, timeout=timeout))
    assert done.code == 0, done
    return json.loads(done.out)


def test_an_edit_within_the_same_second_counts(checkout):
    """The parent keeps nothing of what a child imported."""
    bodies = [GOOD, "return x + factor", GOOD, "return x * +factor", GOOD.replace("x", "2")]
    found = run(checkout, *bodies)
    assert [ok for ok, *_ in found] == [True, False, True, True, False]
    assert found[2][4] < 2.0  # no interpreter was started for it


def test_a_syntax_error_is_red_in_words(checkout):
    ((ok, passed, reason, reds, _),) = run(checkout, "return x *")
    assert (ok, passed, reason, reds) == (False, 0, "", 4)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("os._exit(0)", "ended early, in test_doubles"),
        ("os._exit(1)", "ended early, in test_doubles"),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV, in test_doubles"),
        ("time.sleep(600)", "longer than 3 s, in test_doubles"),
        ("bytearray(10 << 30)", ""),
        ("[os.write(2, b'x' * 65536) for _ in range(10_000)]", ""),
        ("os.write(1, b'[]' * 9); sys.__stdout__.write('{}'); os._exit(0)", "ended early"),
    ],
    ids=["exit 0", "exit 1", "segfault", "hang", "10 GB", "flood", "forged answer"],
)
def test_what_misbehaves_is_red_and_the_next_run_is_clean(checkout, body, says):
    bad, good = run(checkout, body, GOOD, timeout=3)
    assert not bad[0] and says in bad[2], bad
    assert good[:4] == [True, 4, "", 0], good


def test_nothing_is_left_running(checkout):
    marker = "left-behind-by-kata-01"
    body = f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', '{marker}'])"
    run(checkout, f"{body}; {GOOD}")
    listing = checkout.python(
        "-c",
        "import pathlib; print([p.read_bytes() for p in pathlib.Path('/proc').glob('*/cmdline')"
        " if p.parent.name.isdigit()])",
    )
    assert marker not in listing.out.replace("glob", "")
