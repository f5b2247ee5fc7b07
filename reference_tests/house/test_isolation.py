"""Attacks on the harness by one kata: it is red with the reason, the others are as ever.

The table of docs/isolation.md: pytest reference_tests/house/test_isolation.py -m benchmark
"""

import re
from dataclasses import dataclass

import pytest

from harness import catalog, runner, warm
from harness.paths import REFERENCE, ROOT

DOCUMENT = ROOT / "docs/isolation.md"


@dataclass(frozen=True)
class Attack:
    """Code at the head of a function that the spec calls, and what is said of it."""

    name: str
    code: str
    says: str


ATTACKS = [
    Attack("an endless loop in Python", "while True: pass", "took longer than"),
    Attack(
        "an endless loop in C", "import itertools; sum(itertools.repeat(0))", "took longer than"
    ),
    Attack("os._exit(0)", "import os; os._exit(0)", "the process ended early"),
    Attack("sys.exit(0)", "import sys; sys.exit(0)", "SystemExit"),
    Attack("a segfault", "import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    Attack("10 GB of memory", "bytearray(10 << 30)", "MemoryError"),
    Attack(
        "a flood on the standard output",
        "import os; [os.write(1, b'y' * 65536) for _ in iter(int, 1)]",
        "",
    ),
    Attack(
        "a fork that goes on",
        "import os, time\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)",
        "the process ended early",
    ),
    Attack(
        "pytest patched",
        "import _pytest.python as p; p.Function.runtest = lambda self: None",
        "Function.runtest was replaced",
    ),
    Attack(
        "the spec's comparison patched",
        "import harness.spec as s\n"
        "    for name in ('assert_close', 'assert_equal', 'check', 'compare', 'fail'):\n"
        "        setattr(s, name, lambda *a, **k: None)",
        "was replaced",
    ),
    Attack(
        "results forged",
        "import json, os\n"
        "    with open(os.environ.get('KATA_RESULTS', os.devnull), 'a') as f:\n"
        "        f.write(json.dumps({'event': 'finish', 'exit': 0}) + '\\n')\n"
        "    os._exit(0)",
        "no result for",
    ),
    Attack("the current folder changed", "import os; os.chdir('/')", "the current folder is /"),
    Attack(
        "a thread left running",
        "import threading, time\n"
        "    def spin():\n"
        "        while True: time.sleep(0.01)\n"
        "    threading.Thread(target=spin, name='spin').start()",
        "left running: spin",
    ),
    Attack(
        "torch's default dtype changed",
        "import torch; torch.set_default_dtype(torch.float64)",
        "torch's default dtype is torch.float64",
    ),
    Attack(
        "gradients switched off", "import torch; torch.set_grad_enabled(False)", "is_grad_enabled"
    ),
]
NEEDS_TORCH = ("torch", "gradients")


def ids(attacks):
    return [re.sub(r"\W+", "-", attack.name) for attack in attacks]


SCALE = """import math

def scale(x, *, factor=2):
    if not math.isfinite(factor):
        raise ValueError("factor")
    CODE
    return x * factor

def total(values):
    return sum(values)
"""
ALONE = '''"""Shifting (kata 02)."""

def shift(x):
    return 2 * x + 1
'''
LIGHT = [attack for attack in ATTACKS if not attack.name.startswith(NEEDS_TORCH)]
SCRIPT = """
import json
from harness import catalog, runner, warm
warm.USUAL = ("pytest", "harness.plugin", "harness.spec")
with runner.runs(cold={cold}) as run:
    for name in ("01", "02"):
        found = run(catalog.find(name), timeout=6)
        facts = [text for red in found.reds for fact in red.facts for text in fact]
        print(json.dumps([found.ok, found.passed, found.reason, facts]))
"""


@pytest.mark.parametrize("cold", [False, True], ids=["forks", "fresh"])
@pytest.mark.parametrize("attack", LIGHT, ids=ids(LIGHT))
def test_that_kata_is_red_with_the_reason_and_the_other_is_green(checkout, attack, cold):
    import json

    if not (cold or warm.available()):
        pytest.skip("this system cannot fork")
    checkout.scale.write_text(SCALE.replace("CODE", attack.code))
    (checkout.root / "src/recsys/models/shift.py").write_text(ALONE)
    done = checkout.python("-c", SCRIPT.format(cold=cold))
    assert done.code == 0, done
    attacked, other = (json.loads(line) for line in done.out.splitlines())
    assert not attacked[0] and attacked[1] < 4
    assert attack.says in f"{attacked[2]} {attacked[3]}", attacked
    assert other == [True, 1, "", []]


@pytest.mark.benchmark
def test_table(tmp_path):
    """Every attack from within kata 01's lookup, in forks and in fresh processes."""
    attacked, *others = (catalog.find(name) for name in ("01", "03", "06"))
    source = (REFERENCE / "recsys/models/embedding.py").read_text()
    head = "        _check_integer(\"ids\", ids)\n"
    assert source.count(head) == 1
    lines = []
    for attack in ATTACKS:
        cells = [attack.name]
        for cold in (False, True):
            root = tmp_path / f"{len(lines)}-{cold}"
            file = root / "recsys/models/embedding.py"
            file.parent.mkdir(parents=True)
            code = attack.code.replace("\n", "\n    ")
            file.write_text(source.replace(head, f"        {code}\n{head}"))
            with runner.runs(cold=cold) as run:
                red = run(attacked, [str(root), "reference"], timeout=20)
                green = [run(kata, ["reference"]) for kata in others]
            assert not red.ok and all(each.ok for each in green)
            facts = [f"{label}: {text}" for label, text in red.reds[0].facts] if red.reds else []
            came = [fact for fact in facts if attack.says and attack.says in fact]
            cells.append(red.reason or came[0].partition(": ")[2].partition("\n")[0])
        cells.append("green")
        lines.append(f"| {' | '.join(cells)} |")
    DOCUMENT.write_text(
        "# Isolation\n\nWhat happens when one kata's code misbehaves, from within a lookup of "
        "kata 01: it is red with the\nreason, and katas 03 and 06, run after it, are as in a clean "
        "run. The same attacks are tests.\nWritten by\n"
        "`pytest reference_tests/house/test_isolation.py -m benchmark`.\n\n"
        "| attack | in a fork of the warm process | in a fresh process | other katas |\n"
        "| --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
