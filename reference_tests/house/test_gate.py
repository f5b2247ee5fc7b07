"""`kata gate`: what differs from upstream is red, and no learner's code turns it green.

The table of docs/gate.md: pytest reference_tests/house/test_gate.py -m benchmark
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.paths import ROOT

DOCUMENT = ROOT / "docs/gate.md"
SYSTEM = '''"""The system (kata 10)."""

from recsys.models.scale import scale


def system(x: int) -> int:
    """Four times the value."""
    return scale(scale(x))
'''
SYSTEM_SPEC = '''from harness.spec import assert_equal, fixture, learner, rung

pipeline = learner("pipeline")
numbers = learner("data.numbers")


@rung(hint="Twice.")
def test_whole():
    """The system gives four times the value."""
    assert_equal(pipeline.system(numbers.SEVEN), int(fixture("golden.txt").read_text()))


@rung(hint="Nothing.")
def test_nothing():
    """Nothing gives nothing."""
    assert_equal(pipeline.system(0), 0)
'''
TOML = """title = "Integration"
phase = "sprint"
hours = 1
track = "core"
prerequisites = ["01_scale"]

[files]
"pipeline.py" = ["system"]
"""
PROJECT = """[project]
name = "small"
version = "0.3.0"

[tool.ruff]
line-length = 100
"""
FILES = {
    "katas/10_integration/kata.toml": TOML,
    "katas/10_integration/test_spec.py": SYSTEM_SPEC,
    "fixtures/10_integration/golden.txt": "28\n",
    "src/recsys/data/numbers.py": "SEVEN = 7\n",
    "reference_tests/solution/recsys/pipeline.py": SYSTEM,
    "configs/default.yaml": "a: 1\n",
    "constraints.txt": "numpy\n",
    "pyproject.toml": PROJECT,
    ".gitignore": "__pycache__/\n/.kata/\n",
}


@dataclass
class Fork:
    """A learner's clone, whose upstream tagged this version."""

    checkout: object
    root: Path

    def write(self, path, text):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def git(self, *command):
        git(self.root, *command)

    def gate(self, *args, **env):
        """(exit code, first JSON line) of `kata gate --json`."""
        done = self.checkout.python("-m", "harness", "gate", "--json", *args, **env)
        assert done.out.count("\n") == 1, done
        return done.code, json.loads(done.out)


def git(root, *command):
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", root, *name, *command], check=True, capture_output=True)


@pytest.fixture
def fork(checkout):
    """A miniature fork in which everything is solved."""
    made = Fork(checkout, checkout.root)
    for path, text in FILES.items():
        made.write(path, text)
    assert checkout.kata("stubs").code == 0
    made.git("init", "-q")
    made.git("add", "-A")
    made.git("commit", "-q", "-m", "upstream")
    made.git("tag", "v0.3.0")
    checkout.solve()
    made.write("src/recsys/pipeline.py", SYSTEM)
    return made


def test_a_solved_fork_is_green(fork, tmp_path):
    page = tmp_path / "summary.md"
    code, verdict = fork.gate(GITHUB_STEP_SUMMARY=str(page))
    assert code == 0 and verdict["verdict"] == "green" and verdict["reasons"] == []
    assert verdict["rungs"] == {"passed": 2, "total": 2, "red": []}
    assert verdict["against"]["ref"] == "v0.3.0" and len(verdict["against"]["commit"]) == 40
    assert set(verdict["not_run"]) == {"synthetic", "movielens", "gpu"}  # no system.yaml here
    text = page.read_text()
    assert text.startswith("## kata gate: green (src)") and "movielens | not run" in text
    assert len(list((fork.root / "katas/10_integration").glob("test_*.py"))) == 1


def test_a_stub_or_a_wrong_part_is_red(fork):
    fork.write("src/recsys/models/scale.py", "def scale(x):\n    return x + 1\n")
    code, verdict = fork.gate()
    assert code == 1 and verdict["rungs"]["red"] == ["test_whole", "test_nothing"]
    assert verdict["reasons"] == ["2 of 2 rungs are red"]
    done = fork.checkout.kata("gate")
    assert done.code == 1 and "kata 10 Integration, rung 1 of 2" in done.out, str(done)


# --- what differs from upstream -------------------------------------------------------------------

CONFTEST = "def pytest_runtest_makereport(item, call): pass\n"
TAMPERED = {
    "spec": ("katas/10_integration/test_spec.py", SYSTEM_SPEC.replace("0), 0", "0), None")),
    "fixture": ("fixtures/10_integration/golden.txt", "29\n"),
    "harness": ("harness/evaluator.py", "def judge(): return 1\n"),
    "data package": ("src/recsys/data/numbers.py", "SEVEN = 8\n"),
    "root conftest": ("conftest.py", CONFTEST),
    "tox.ini": ("tox.ini", "[pytest]\n"),
    "constraints": ("constraints.txt", "numpy<2\n"),
    "configuration": ("configs/default.yaml", "a: 2\n"),
    "solution": ("reference_tests/solution/recsys/pipeline.py", SYSTEM + "\n"),
}
PLANTED = {
    "a spec more": ("katas/10_integration/test_more.py", ""),
    "a conftest in a kata": ("katas/10_integration/conftest.py", CONFTEST),
    "a conftest in src": ("src/conftest.py", CONFTEST),
    "sitecustomize": ("sitecustomize.py", ""),
    "a package that hides the layers": ("src/recsys/__init__.py", ""),
    "a sub-package": ("src/recsys/models/__init__.py", ""),
    "a .pth": ("src/x.pth", "import os\n"),
    "pytest.ini": ("pytest.ini", "[pytest]\n"),
    "setup.cfg": ("katas/setup.cfg", "[tool:pytest]\n"),
    "numpy of one's own": ("src/numpy.py", "pi = 3\n"),
    "a pytest of one's own": ("pytest/__init__.py", ""),
    "a module beside the harness": ("harness/torch.py", ""),
}


def test_what_was_changed_is_red_and_named(fork):
    for path, text in TAMPERED.values():
        fork.write(path, text)
    fork.git("commit", "-q", "-a", "-m", "mine")  # committed or not makes no difference
    code, verdict = fork.gate()
    assert code == 1
    assert verdict["differences"]["changed"] == sorted(path for path, _ in TAMPERED.values())
    assert verdict["reasons"] == [f"{len(TAMPERED)} files differ from v0.3.0"]
    assert verdict["rungs"]["passed"] == 2, "the run takes upstream's"


def test_what_was_planted_is_red_and_named(fork):
    for path, text in PLANTED.values():
        fork.write(path, text)
    code, verdict = fork.gate()
    assert code == 1
    assert verdict["differences"]["added"] == sorted(path for path, _ in PLANTED.values())
    assert verdict["rungs"]["passed"] == 2


def test_removed_linked_or_compiled_is_red(fork):
    (fork.root / "fixtures/10_integration/golden.txt").unlink()
    spec = fork.root / "katas/10_integration/test_spec.py"
    spec.rename(fork.root / "elsewhere.py")
    spec.symlink_to(fork.root / "elsewhere.py")
    (fork.root / "configs/default.yaml").unlink()
    os.mkfifo(fork.root / "configs/default.yaml")
    fork.write("harness/__pycache__/evaluator.cpython-311.pyc", "x")
    fork.git("add", "-f", "harness/__pycache__/evaluator.cpython-311.pyc")
    _, verdict = fork.gate()
    assert verdict["differences"] == {
        "changed": ["configs/default.yaml", "katas/10_integration/test_spec.py"],
        "removed": ["fixtures/10_integration/golden.txt"],
        "added": ["harness/__pycache__/evaluator.cpython-311.pyc"],
    }


def test_settings_in_pyproject(fork):
    own = PROJECT.replace("100", "120") + '\n[dependency-groups]\nmine = ["polars"]\n'
    fork.write("pyproject.toml", own)
    assert fork.gate()[0] == 0
    fork.write("pyproject.toml", own + '\n[tool.pytest.ini_options]\naddopts = "-k nothing"\n')
    code, verdict = fork.gate()
    assert code == 1 and verdict["differences"]["changed"] == ["pyproject.toml [tool.pytest]"]


def test_what_is_the_learners_is_free(fork):
    fork.write("configs/mine.yaml", "a: 3\n")
    fork.write("scratch.py", "print(1)\n")
    fork.write("notes/torch.md", "")
    fork.write("progress/decisions/0001.md", "")
    fork.write("src/recsys/models/helper.py", "TWO = 2\n")
    fork.write("README.md", "mine\n")
    crlf = (fork.root / "katas/10_integration/kata.toml").read_bytes().replace(b"\n", b"\r\n")
    (fork.root / "katas/10_integration/kata.toml").write_bytes(crlf)
    code, verdict = fork.gate()
    assert code == 0, verdict


def test_the_spec_of_the_checkout_is_not_the_one_that_runs(fork):
    weak = SYSTEM_SPEC.replace("int(fixture(\"golden.txt\").read_text())", "35")
    fork.write("katas/10_integration/test_spec.py", weak)
    fork.write("src/recsys/pipeline.py", "def system(x):\n    return 5 * x\n")
    _, verdict = fork.gate()
    assert verdict["rungs"]["red"] == ["test_whole"]


def test_git_does_not_say_otherwise(fork):
    """Replaced objects and filters of the repository change nothing."""
    weak = SYSTEM_SPEC.replace("int(fixture(\"golden.txt\").read_text())", "35")
    spec = "katas/10_integration/test_spec.py"
    fork.write(spec, weak)
    ids = [f"v0.3.0:{spec}"]
    ask = ["git", "-C", fork.root]
    old = subprocess.check_output([*ask, "rev-parse", *ids], text=True).strip()
    new = subprocess.check_output([*ask, "hash-object", "-w", spec], text=True).strip()
    fork.git("replace", old, new)
    fork.git("config", "filter.x.clean", f"git cat-file blob {old}")
    (fork.root / ".git/info/attributes").write_text(f"{spec} filter=x\n")
    fork.git("update-index", "--assume-unchanged", spec)
    code, verdict = fork.gate()
    assert code == 1 and verdict["differences"]["changed"] == [spec]


# --- which reference, which folders ---------------------------------------------------------------


def test_without_a_reference_it_says_what_to_do(fork):
    fork.git("tag", "-d", "v0.3.0")
    done = fork.checkout.kata("gate")
    assert done.code == 2 and "there is no v0.3.0" in done.err and "--against REF" in done.err, done
    assert fork.gate("--against", "HEAD")[0] == 0
    assert fork.checkout.kata("gate", "--against", "nowhere").code == 2
    assert fork.checkout.kata("gate", "--against", "HEAD", "--require", "tpu").code == 2


def test_required_and_not_run_is_red(fork):
    code, verdict = fork.gate("--require", "movielens,gpu")
    assert code == 1 and len(verdict["reasons"]) == 2
    assert "KATA_DATA is not set" in verdict["reasons"][0]


def test_mine_is_the_reference_in_the_gaps(fork):
    fork.git("checkout", "-q", "v0.3.0", "src")
    assert fork.gate()[0] == 1, "stubs"
    fork.write("src/recsys/models/scale.py", "def scale(x):\n    return x + x\n")
    code, verdict = fork.gate("--impl", "mine")
    assert code == 0 and "pipeline.py" in verdict["same_as_reference"]
    assert "models/scale.py" not in verdict["same_as_reference"]


def test_many_folders_are_judged_each_for_itself(fork, tmp_path):
    wrong = fork.checkout.layer("wrong", "def scale(x):\n    return x\n")
    right = fork.checkout.layer("right", "def scale(x):\n    return x + x\n")
    clone = tmp_path / "clone"
    git(fork.root, "clone", "-q", fork.root, clone)  # stubs, and one fixture of its own
    (clone / "fixtures/10_integration/golden.txt").write_text("7\n")
    given = ["--impl", wrong, right, "reference", clone]
    done = fork.checkout.kata("gate", "--json", *given)
    verdicts = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 1, done
    assert [v["verdict"] for v in verdicts] == ["red", "green", "green", "red"]
    assert [v["impl"] for v in verdicts] == [str(i) for i in given[1:]]
    assert verdicts[3]["differences"]["changed"] == ["fixtures/10_integration/golden.txt"]
    assert verdicts[3]["rungs"]["passed"] == 0, "nothing of this checkout is lent to another"
    code, verdict = fork.gate("--impl", wrong, "--impl", right)
    assert (code, verdict["impl"]) == (1, str(wrong)), "a further --impl is a layer below"
    code, verdict = fork.gate("--impl", right, "--impl", "reference")
    assert code == 0 and verdict["same_as_reference"] == ["models/shift.py", "pipeline.py"]


# --- code that means to be green ------------------------------------------------------------------

WRONG = "def system(x):\n    CODE\n    return 3 * x\n"
RESULT = """import json, os
    from harness import catalog
    kata = catalog.find("10")
    with open(os.environ["KATA_RESULTS"], "a") as file:
        for rung in kata.rungs:
            for when in ("setup", "call", "teardown"):
                file.write(json.dumps({"event": when, "outcome": "passed", "rung": rung.name,
                                       "nodeid": "a::" + rung.name, "facts": []}) + "\\n")
        file.write(json.dumps({"event": "finish", "exit": 0}) + "\\n")
        file.flush()
        os._exit(0)"""
ATTACKS = {
    "prints passes": ("print('2 passed')", "rungs are red"),
    "os._exit(0)": ("import os; os._exit(0)", "ended early"),
    "sys.exit(0)": ("import sys; sys.exit(0)", "red"),
    "pytest.exit": ("import pytest; pytest.exit('done', 0)", ""),
    "pytest.skip": ("import pytest; pytest.skip('later')", "rungs are red"),
    "forges all results": (RESULT, "forged"),
    "patches the comparison": (
        "import harness.spec as s\n"
        "    for name in ('compare', 'fail', 'check', 'assert_equal'):\n"
        "        setattr(s, name, lambda *a, **k: None)",
        "red",
    ),
    "patches the guard and the comparison": (
        "import harness.spec as s, harness.guard as g, sys\n"
        "    g.Guard.broken = lambda self: []\n"
        "    s.fail = s.check = lambda *a, **k: None\n"
        "    for m in list(sys.modules.values()):\n"
        "        if hasattr(m, 'assert_equal'): m.assert_equal = m.check = lambda *a, **k: None",
        "",
    ),
    "patches pytest's reports": (
        "import _pytest.reports as r\n"
        "    new = r.TestReport.from_item_and_call.__func__\n"
        "    def passed(cls, item, call):\n"
        "        call.excinfo = None\n"
        "        return new(cls, item, call)\n"
        "    r.TestReport.from_item_and_call = classmethod(passed)",
        "",
    ),
    "writes to the spec": (
        "import harness.paths as p\n"
        "    file = p.KATAS / '10_integration' / 'test_spec.py'\n"
        "    file.write_text('')",
        "red",
    ),
    "reads the answers in the checkout": (
        "import importlib.util as u\n"
        "    place = 'ROOT/reference_tests/solution/recsys/pipeline.py'\n"
        "    s = u.spec_from_file_location('solution', place); m = u.module_from_spec(s)\n"
        "    s.loader.exec_module(m); return m.system(x)",
        "red",
    ),
    "imports reference_tests": ("import reference_tests.solution", "rungs are red"),
    "reads the caller's frame": (
        "import inspect\n    return inspect.stack()[1].frame.f_locals['expected']",
        "red",
    ),
    "a process that goes on": (
        "import os, time\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        time.sleep(60) if os.fork() == 0 else os._exit(0)",
        "red",
    ),
    "writes to the fixtures": (
        "import harness.paths as p\n"
        "    (p.FIXTURES / '10_integration' / 'golden.txt').write_text('21')",
        "red",
    ),
    "sets environment variables": (
        "import os\n"
        "    os.environ.update(KATA_IMPL='reference', KATA_RESULTS=os.devnull)",
        "no result",
    ),
    "plants a conftest, a sitecustomize and a .pth": (
        "import os, pathlib, tempfile\n"
        "    for place in ('.', 'katas', 'src', tempfile.gettempdir(), os.environ['HOME']):\n"
        "        for name in ('conftest.py', 'sitecustomize.py', 'x.pth'):\n"
        "            try: pathlib.Path(place, name).write_text('import os; os._exit(0)')\n"
        "            except OSError: pass",
        "red",
    ),
    "a process beside it writes passes": (
        "import json, os, time\n"
        "    from harness import catalog\n"
        "    names = [rung.name for rung in catalog.find('10').rungs]\n"
        "    line = {'event': 'call', 'outcome': 'passed', 'nodeid': 'a::b', 'facts': []}\n"
        "    lines = [json.dumps({**line, 'rung': name}) + '\\n' for name in names]\n"
        "    if os.fork() == 0:\n"
        "        while True:\n"
        "            with open(os.environ['KATA_RESULTS'], 'a') as file: file.writelines(lines)\n"
        "            time.sleep(0.05)",
        "red",
    ),
    "writes to the installed packages": (
        "import sysconfig, pathlib\n"
        "    pathlib.Path(sysconfig.get_path('purelib'), 'kata_gate_x.pth').write_text('')",
        "red",
    ),
}
LINUX = ("reads the answers in the checkout", "writes to the installed packages", "writes to the")


PARTS = 3  # calls, so that none takes long on a busy machine


def verdicts(fork, part):
    """name of an attack -> what the gate says of it, many in one call."""
    from harness import confine

    folders = {}
    for number, (name, (code, _)) in list(enumerate(ATTACKS.items()))[part::PARTS]:
        if confine.available() or not name.startswith(LINUX):
            text = WRONG.replace("CODE", code.replace("ROOT", str(fork.root)))
            folders[name] = fork.checkout.layer(f"attack-{number}", text, "pipeline.py")
    done = fork.checkout.kata("gate", "--json", "--impl", *folders.values(), "--impl", "reference")
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 1 and len(lines) == len(folders), done
    return dict(zip(folders, lines, strict=True))


@pytest.mark.parametrize("part", range(PARTS))
def test_no_attack_is_green(fork, part):
    came = verdicts(fork, part)
    assert {name: line["verdict"] for name, line in came.items()} == dict.fromkeys(came, "red")
    for name, line in came.items():
        assert re.search(ATTACKS[name][1], "; ".join(line["reasons"])), (name, line)
        assert not any(line["differences"].values())


@pytest.mark.benchmark
def test_table(fork):
    """Writes what came of the attacks into docs/gate.md."""
    lines = ["| what learner code did | verdict | said |", "| --- | --- | --- |"]
    came = [verdicts(fork, part) for part in range(PARTS)]
    for name in ATTACKS:
        line = next(part[name] for part in came if name in part)
        lines.append(f"| {name} | {line['verdict']} | {'; '.join(line['reasons'])} |")
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- attacks -->\n")
    tail = rest.partition("<!-- end -->")[2]
    block = "<!-- attacks -->\n" + "\n".join(lines) + "\n<!-- end -->"
    DOCUMENT.write_text(head + block + tail, encoding="utf-8")


def test_nothing_goes_on_after_the_gate(fork, tmp_path):
    """A process that left its session is ended too."""
    if not sys.platform.startswith("linux"):
        pytest.skip("orphans are found on Linux only")
    code = (
        "import os, time\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            os.execvp('sleep', ['sleep', '61.0625'])\n"
        "        os._exit(0)\n"
        "    os.wait()"
    )
    fork.write("src/recsys/pipeline.py", WRONG.replace("CODE", code))
    assert fork.gate()[0] == 1
    assert not [p for p in processes() if b"61.0625" in p]


def processes():
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                yield Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue


def test_the_environment_is_not_handed_on(fork):
    body = "import os\n    assert not {'GITHUB_TOKEN', 'KATA_DATA'} & set(os.environ)"
    fork.write("src/recsys/pipeline.py", WRONG.replace("CODE", body).replace("3 * x", "4 * x"))
    code, verdict = fork.gate(GITHUB_TOKEN="x", KATA_DATA="/nowhere")
    assert code == 0, verdict
