"""Learner code that wants to harm, and a world that does: time, disk, two runs at once."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from harness.paths import REFERENCE, ROOT
from reference_tests.house.conftest import SCALE, Checkout, checkout, pristine  # noqa: F401

# Code at the head of a function that the spec calls; other attacks are in house/test_isolation.py.
VANDALS = {
    "edits the spec": "p = ROOT / 'katas/01_scale/test_spec.py'; p.write_text(p.read_text() + '#')",
    "empties the spec": "(ROOT / 'katas/01_scale/test_spec.py').write_text('')",
    "deletes the spec": "(ROOT / 'katas/01_scale/test_spec.py').unlink()",
    "edits the fixtures": "(ROOT / 'fixtures/01_scale/golden.json').write_text('{}')",
    "deletes the fixtures": "shutil.rmtree(ROOT / 'fixtures/01_scale')",
    "deletes its own file": "Path(__file__).unlink()",
    "edits its own file": "Path(__file__).write_text('def scale(x, *, factor=2): return 42')",
    "deletes all katas": "shutil.rmtree(ROOT / 'katas')",
    "deletes the record": "shutil.rmtree(ROOT / '.kata')",
    "writes rubbish into the record": "(ROOT / '.kata/record.json').write_text('rubbish')",
}
HEAD = """import math, shutil
from pathlib import Path
ROOT = Path({root!r})

def scale(x, *, factor=2):
    if not math.isfinite(factor):
        raise ValueError("factor")
    {code}
    return x * factor

def total(values):
    return sum(values)
"""


@pytest.mark.parametrize("what", VANDALS)
def test_vandals_gain_nothing(checkout, what, tally, often):  # noqa: F811
    """What they changed makes the result red or stale; no command ends in a traceback."""
    if list(VANDALS).index(what) % 3 and not often(0, 1):
        pytest.skip("in the long form")
    golden = checkout.root / "fixtures/01_scale/golden.json"
    golden.parent.mkdir(parents=True)
    golden.write_text('{"a": 1}')
    code = f"try: {VANDALS[what]}\n    except OSError: pass"
    code = HEAD.format(root=str(checkout.root), code=code)
    checkout.scale.write_text(code)
    done = checkout.kata("test", "01")
    assert "Traceback" not in str(done) and done.code in (0, 1), done
    status = checkout.kata("status", "--json")
    if what == "deletes all katas":
        assert done.code == 1 or status.code != 0 or not json.loads(status.out)["katas"], done
        happened = "red"
    else:
        state = json.loads(status.out)["katas"][0]["state"]
        assert "record" in what or state != "passing", f"{state} {done}"
        happened = {"passing": "recorded as it was"}.get(state, state.replace("_", " "))
    assert "Traceback" not in str(status)
    tally("learner code that edits or deletes the spec, fixtures, itself, the record", happened)


SOLUTION = REFERENCE / "recsys/models/embedding.py"
LOOKUP = '        _check_integer("ids", ids)\n'  # the head of what the spec calls first
FAKES = {  # what judges, replaced so that everything looks right
    "Tensor.__sub__": "torch.Tensor.__sub__ = lambda a, b: torch.zeros_like(a)",
    "Tensor.__eq__": "torch.Tensor.__eq__ = lambda a, b: torch.ones_like(a, dtype=torch.bool)",
    "Tensor.any": "torch.Tensor.any = lambda a: torch.tensor(False)",
    "torch.where": "torch.where = lambda a, *b: torch.zeros_like(a, dtype=torch.float64)",
    "torch.equal": "torch.equal = torch.allclose = lambda *a, **k: True",
    "torch.testing.assert_close": "import torch.testing as t; t.assert_close = print",
    "torch.autograd.grad": "torch.autograd.grad = lambda out, into, *a: (into,)",
    "builtins.bool": "import builtins; builtins.bool = lambda x: False",
    "math.isnan": "import math; math.isnan = lambda x: False",
    "Guard.broken": "from harness import guard; guard.Guard.broken = lambda self: []; "
    "torch.Tensor.__sub__ = lambda a, b: torch.zeros_like(a)",
}


def judged(folder, code):
    """pytest on kata 01 with `code` at the head of its lookup."""
    file = folder / "recsys/models/embedding.py"
    file.parent.mkdir(parents=True)
    source = SOLUTION.read_text()
    assert source.count(LOOKUP) == 1
    file.write_text(source.replace(LOOKUP, f"        {code}\n{LOOKUP}"))
    command = [sys.executable, "-m", "pytest", "-q", "katas/01_embedding_table/test_spec.py"]
    return subprocess.run([*command, "--impl", str(folder), "--impl", "reference"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.mark.parametrize("what", FAKES)
def test_what_judges_cannot_be_replaced(tmp_path, what, tally, often):
    """Torch's own functions, too: a wrong lookup is as red as without."""
    if list(FAKES).index(what) > 1 and not often(0, 1):
        pytest.skip("in the long form")
    done = judged(tmp_path, f"{FAKES[what]}; ids = ids.roll(1)")
    failed = re.search(r"^(\d+) failed", done.stdout, re.MULTILINE)
    assert failed and int(failed[1]) >= 2, done
    tally("learner code that replaces functions of torch, Python or the guard",
          "red, the replaced one named" if "was replaced" in done.stdout else "red")  # fmt: skip


SEEDS = {
    "torch.manual_seed(3)": "no random number drawn",
    "torch.seed()": "no random number drawn",
    "import random as r; import numpy as n; r.seed(3); n.random.seed(3)": "12 passed",
}


@pytest.mark.parametrize("code", SEEDS)
def test_a_seed_that_is_left_behind(tmp_path, code, tally, often):
    """The rung that forbids it is red, the others are judged as ever."""
    if code != "torch.manual_seed(3)" and not often(0, 1):
        pytest.skip("in the long form")
    done = judged(tmp_path, code)
    assert SEEDS[code] in done.stdout, done
    assert re.search(r"^1 failed, 11 passed|^12 passed", done.stdout, re.MULTILINE), done
    tally("learner code that leaves a seed behind",
          "red in the rung that forbids it" if done.returncode else "judged as ever")


def test_two_runs_at_once(checkout, tally, often):  # noqa: F811
    """Two `kata test` and many boards: all end well, and the record has both results."""
    checkout.solve()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
    kata = [sys.executable, "-m", "harness"]
    for _ in range(often(1, 4)):
        shutil.rmtree(checkout.root / ".kata", ignore_errors=True)
        tests = [subprocess.Popen([*kata, "test", name], cwd=checkout.root, env=env,
                                  stdout=subprocess.DEVNULL) for name in ("01", "02")]  # fmt: skip
        while any(child.poll() is None for child in tests):
            seen = checkout.kata("status", "--json")
            assert seen.code == 0 and seen.err == "", seen
            tally("`kata status` while two `kata test` write the record", "whole")
        assert tests[0].returncode == 0
        record = json.loads((checkout.root / ".kata/record.json").read_text())
        assert set(record["katas"]) == {"01_scale", "02_shift"}
        tally("two `kata test` at once", "both results are in the record")


def test_killed_while_testing(checkout, tally, often):  # noqa: F811
    """SIGKILL to `kata test` at a random moment: the record is whole, and nothing runs on."""
    if not Path("/proc").is_dir():
        pytest.skip("who runs is read from /proc")
    checkout.solve()
    assert checkout.kata("test").code == 1  # 02 is a stub
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
    rng = random.Random(0)
    for _ in range(often(1, 20)):
        child = subprocess.Popen([sys.executable, "-m", "harness", "test"], cwd=checkout.root,
                                 env=env, stdout=subprocess.DEVNULL)  # fmt: skip
        time.sleep(rng.uniform(0, 2.5))
        child.kill()
        child.wait()
        seen = checkout.kata("status", "--json")
        assert seen.code == 0 and seen.err == "", seen
        assert len(json.loads(seen.out)["katas"]) == 2
        tally("`kata test` killed at a random moment", "the record is whole")
    until = time.monotonic() + 240  # a warm process that was being made has torch to import first
    while left := running_in(checkout.root):
        assert time.monotonic() < until, f"still running: {left}"
        time.sleep(0.1)


def running_in(folder: Path) -> list[str]:
    """Command lines of processes whose current folder is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


DATES = ["1970-01-01T00:00:00+0000", "2199-01-01T00:00:00+0000", "", "yesterday", "2026-02-31"]


@pytest.mark.parametrize("command", [[], ["status", "--json"], ["report"], ["test", "01"]],
                         ids=["board", "status", "report", "test"])  # fmt: skip
def test_a_clock_that_was_set_back(checkout, command, tally, often):  # noqa: F811
    """Results and files of the future, of 1970, and of no date at all."""
    if command not in (["report"], ["status", "--json"]) and not often(0, 1):
        pytest.skip("in the long form")
    checkout.solve()
    assert checkout.kata("test", "01").code == 0
    file = checkout.root / ".kata/record.json"
    history = checkout.root / ".kata/history.jsonl"
    whole, line = json.loads(file.read_text()), json.loads(history.read_text())
    for date, stamp in list(zip(DATES, (0, 7e9, 1, 2, 3), strict=True))[-often(2, 5) :]:
        whole["katas"]["01_scale"]["when"] = date
        file.write_text(json.dumps(whole))
        history.write_text("".join(json.dumps(line | {"when": w}) + "\n" for w in (date, *DATES)))
        os.utime(checkout.scale, (stamp, stamp))
        done = checkout.kata(*command)
        assert done.code == 0 and "Traceback" not in str(done), done
        tally("commands after the clock was set, with dates that are none", "as ever")
    if command != ["status", "--json"]:
        return
    checkout.scale.write_text(SCALE.replace("x * factor", "x + factor"))
    os.utime(checkout.scale, (0, 0))  # older than its result, and than any .pyc
    assert json.loads(checkout.kata("status", "--json").out)["katas"][0]["state"] == "stale"
    assert checkout.kata("test", "01").code == 1
    tally("a change that is dated before its result", "stale, then red")


COMMANDS = [[], ["status", "--json"], ["test", "01"], ["hint", "01"], ["report"], ["reset", "01"],
            ["review", "01"], ["brief", "01", "--json"], ["guide", "01"]]  # fmt: skip


def test_a_checkout_that_cannot_be_written(pristine, tally, often):  # noqa: F811
    """Every command works, or says in a sentence what it cannot write."""
    with tempfile.TemporaryDirectory(prefix="readonly-", ignore_cleanup_errors=True) as folder:
        root = Path(folder) / "checkout"
        shutil.copytree(pristine, root, ignore=shutil.ignore_patterns("__pycache__"))
        Checkout(root).solve()
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
        if subprocess.run(["touch", str(root / "new")], preexec_fn=as_anybody).returncode == 0:
            pytest.skip("nothing keeps this user from writing")
        for command in COMMANDS[: often(4, 100)]:
            done = subprocess.run([sys.executable, "-m", "harness", *command], cwd=root,
                                  env=env | {"HOME": folder}, capture_output=True, text=True,
                                  timeout=120, preexec_fn=as_anybody)  # fmt: skip
            assert "Traceback" not in done.stderr + done.stdout, (command, done.stdout, done.stderr)
            if done.returncode:
                said = [x for x in done.stderr.splitlines() if x.startswith("kata: ")]
                assert said and "harness itself failed" not in done.stderr, (command, done)
            tally("commands in a checkout that cannot be written",
                  "a sentence" if done.returncode else "works")  # fmt: skip
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def as_anybody() -> None:
    """Permissions hold for root, too: the capabilities that pass them by are dropped at exec."""
    if os.geteuid() == 0 and sys.platform == "linux":
        import ctypes

        for capability in (1, 2, 3):  # DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
