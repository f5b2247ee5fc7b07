"""What learner code can reach while `kata gate` runs it: neither test rows nor anybody's files.

The same attempts are made where nothing is sealed, so that each is known to work there.
The table of docs/gate.md: pytest reference_tests/system/test_gate_sealed.py -m benchmark
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from harness import confine, gate
from harness.paths import ROOT

HEAD = '''"""A pipeline that looks for the answers instead of learning."""

import ctypes, gc, inspect, json, os, subprocess, sys, sysconfig, tempfile
from pathlib import Path

import numpy as np

PLACES = json.loads(r"""{places}""")


def run(dataset, split, config, *, seed, device, log):
    came = {{}}
    for name, attempt in ATTEMPTS.items():
        try:
            came[name] = "reached: " + str(attempt(dataset, split))[:60]
        except BaseException as error:
            came[name] = type(error).__name__
    raise RuntimeError(json.dumps(came))


def whole(found, split):
    """Whether a data set holds more rows than may be known."""
    known = len(split.train) + len(split.validation)
    if not any(len(each.user) > known for each in found):
        raise LookupError("no test rows")
    return "test rows"
'''
# name -> (what was tried, in words; the body of a function of (dataset, split))
ATTEMPTS = {
    "again": (
        "generate the data again from each likely seed",
        """
    from recsys.data.synthetic import generate
    for seed in range(4):
        made = generate(seed=seed, users=dataset.num_users, items=250)
        if all((made.user_features[n] == f).all() for n, f in dataset.user_features.items()):
            return f"seed {seed}"
    raise LookupError("no such seed")""",
    ),
    "objects": (
        "look through all objects in memory for test rows",
        """
    kind = type(dataset)
    return whole([each for each in gc.get_objects() if type(each) is kind], split)""",
    ),
    "frames": (
        "look through the callers' variables for test rows",
        """
    values = [v for frame in inspect.stack() for v in frame.frame.f_locals.values()]
    return whole([each for each in values if type(each) is type(dataset)], split)""",
    ),
    "memory": (
        "read the memory of the process that judges",
        """
    parent = os.getppid()
    with open(f"/proc/{parent}/maps") as maps:
        start = int(next(line for line in maps if " rw-p" in line).split("-")[0], 16)
    with open(f"/proc/{parent}/mem", "rb") as memory:
        memory.seek(start)
        return f"{len(memory.read(64))} bytes\"""",
    ),
    "environ": (
        "read the environment of the process that judges",
        """
    return f"{len(Path(f'/proc/{os.getppid()}/environ').read_bytes())} bytes\"""",
    ),
    "signal": (
        "signal the process that judges",
        """
    return os.kill(os.getppid(), 0)""",
    ),
    "data": (
        "read a data set elsewhere on the disk",
        """
    return Path(PLACES["data"]).read_text()""",
    ),
    "solution": (
        "read the reference solution of the checkout",
        """
    return Path(PLACES["solution"]).read_text()""",
    ),
    "import": (
        "import reference_tests",
        """
    sys.path.insert(0, PLACES["root"])
    import reference_tests.solution.recsys.models.embedding as theirs
    return theirs.__name__""",
    ),
    "side": (
        "read the lists of the reference beside it",
        """
    return (Path(tempfile.gettempdir()).parent / "b/lists-0.npz").read_text()""",
    ),
    "spoil": (
        "spoil the data of the reference beside it",
        """
    place = Path(tempfile.gettempdir()).parent / "b/spoilt"
    place.write_text("x")
    return place""",
    ),
    "packages": (
        "write into the installed packages",
        """
    place = Path(sysconfig.get_path("purelib"), "kata_gate_attempt.pth")
    place.write_text("")
    place.unlink()
    return place.name""",
    ),
    "harness": (
        "write into the harness and the specs that judge",
        """
    import harness.evaluator as evaluator
    with open(evaluator.__file__, "a") as file:
        file.write("")
    return "harness/evaluator.py\"""",
    ),
    "summary": (
        "write the summary of the CI",
        """
    return Path(os.environ["GITHUB_STEP_SUMMARY"])""",
    ),
    "child": (
        "the same from a process that it starts",
        """
    code = "import sys; print(open(sys.argv[1]).read())"
    command = [sys.executable, "-I", "-c", code, PLACES["data"]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout""",
    ),
}
DOCUMENT = ROOT / "docs/gate.md"
SEALED_BY_DATA = ("again", "objects", "frames", "summary")  # hold on any system


def pipeline(places):
    functions = [f"def try_{name}(dataset, split):{body}\n" for name, (_, body) in ATTEMPTS.items()]
    table = "ATTEMPTS = {" + ", ".join(f"{name!r}: try_{name}" for name in ATTEMPTS) + "}\n"
    return "\n\n".join([HEAD.format(places=json.dumps(places)), *functions, table])


def tree(folder, text):
    """What the gate lays out for a side, with `text` as its pipeline."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("harness", "fixtures", "configs", "src/recsys/data"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "src/recsys/pipeline.py").write_text(text)
    return folder


def attempts(tmp_path, monkeypatch, *, sealed):
    """name -> what came of each attempt, within the gate or where nothing is sealed."""
    from harness import overlay, system

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    answers = tmp_path / "elsewhere/u.data"
    answers.parent.mkdir()
    answers.write_text("the answers")
    solution = ROOT / "reference_tests/solution/recsys/pipeline.py"
    places = {"data": str(answers), "solution": str(solution), "root": str(ROOT)}
    top = tree(tmp_path / "tree", pipeline(places))
    folder = tmp_path / "job"
    (folder / "b").mkdir(parents=True)
    (folder / "b/lists-0.npz").write_text("the reference's lists")
    with overlay.using([overlay.Root("tree", top / "src")]):
        job = system.make_job(folder, "synthetic", data_seed() if sealed else 3)
        if not sealed:
            from harness.candidate import save

            parts = {"train": job.split.train, "validation": job.split.validation}
            save(job.path, job.dataset, parts)
        launch = gate.launcher(top) if sealed else leaky
        with system.side("mine", [top / "src"], folder / "a", launch) as side:
            with pytest.raises(system.CandidateError) as caught:
                out = str(folder / "a/lists.npz")
                side.ask("quality", job=str(job.path), seed=0, device="cpu", out=out)
    return json.loads(str(caught.value))


def data_seed():
    import secrets

    return secrets.randbits(62)


def leaky(command, folder):
    """A side as a plain process of this one."""
    import subprocess

    env = os.environ | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    cwd = folder.parents[1] / "tree"
    command = [sys.executable, *command]
    return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=True, **pipes)


@pytest.mark.benchmark
def test_table(tmp_path, monkeypatch):
    (tmp_path / "sealed").mkdir()
    (tmp_path / "open").mkdir()
    sealed = attempts(tmp_path / "sealed", monkeypatch, sealed=True)
    unsealed = attempts(tmp_path / "open", monkeypatch, sealed=False)
    lines = ["| what learner code tried | in the gate | where nothing is sealed |"]
    lines.append("| --- | --- | --- |")
    for name, (words, _) in ATTEMPTS.items():
        short = [came[name].partition(":")[0] for came in (sealed, unsealed)]
        lines.append(f"| {words} | {short[0]} | {short[1]} |")
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition("<!-- sealed -->\n")
    tail = rest.partition("<!-- end -->")[2]
    block = "<!-- sealed -->\n" + "\n".join(lines) + "\n<!-- end -->"
    DOCUMENT.write_text(head + block + tail, encoding="utf-8")


def test_nothing_is_reached(tmp_path, monkeypatch):
    came = attempts(tmp_path, monkeypatch, sealed=True)
    held = ATTEMPTS if confine.available() else SEALED_BY_DATA
    assert {n: came[n] for n in held if came[n].startswith("reached")} == {}, came


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="the attempts are for Linux")
def test_each_attempt_reaches_something_where_nothing_is_sealed(tmp_path, monkeypatch):
    came = attempts(tmp_path, monkeypatch, sealed=False)
    refused = {n for n in ATTEMPTS if not came[n].startswith("reached")}
    assert refused <= {"memory", "environ"}, came  # systems may forbid these two anyway


# --- what is believed -----------------------------------------------------------------------------

MADE_UP = '''"""A pipeline that guesses and says that it is perfect."""

import numpy as np


class Recommender:
    def __init__(self, lists, ids):
        self.lists, self.ids = lists, ids

    def recommend_batch(self, users, counts):
        return [[(item, 1.0) for item in self.ids[row[:10]]] for row in self.lists]


def run(dataset, split, config, *, seed, device, log):
    import harness.evaluator as evaluator

    evaluator.per_user = lambda ranks, metric, k: np.ones(len(ranks))
    evaluator.target_ranks = lambda items, scores, target: np.ones(len(target))
    scores = np.random.default_rng(0).random((dataset.num_users, dataset.num_items))
    scores[dataset.user, dataset.item] = -1.0
    items = np.argsort(-scores, axis=1)[:, :50]
    scores = np.take_along_axis(scores, items, 1)
    lists = {"items": items, "scores": scores, "ndcg@10": 1.0}
    print("NDCG@10 1.0")
    return {
        "retrieval": {**lists, "metrics": [1.0]},
        "ranking": {"logits": scores},
        "final": lists,
        "recommender": Recommender(items, dataset.item_ids),
    }
'''


def test_made_up_figures_are_not_believed(tmp_path):
    from harness import overlay, system

    top = tree(tmp_path / "tree", MADE_UP)
    with overlay.using([overlay.Root("tree", top / "src")]):
        job = system.make_job(tmp_path, "synthetic", data_seed())
        with system.side("mine", [top / "src"], tmp_path / "a", gate.launcher(top)) as side:
            (figures,) = system.run_quality([side], job, 0, "cpu", cold=False)
    assert figures["final"].mean() < figures["popularity"].mean() / 2
    findings = {f.name: f.good for f in system.compare([figures], [figures])}
    assert findings["popularity"] is False


class Stand:
    """In place of harness/system.py."""

    def __init__(self, *findings):
        self.findings = findings

    def verdict(self, *roots, **options):
        self.options = options
        from harness import system

        if not self.findings:
            raise RecursionError("nested lists")
        return system.Verdict(options["data"], [0], "cpu", list(self.findings))


def reasons(*findings):
    made = gate.Verdict("x")
    stand = Stand(*findings)
    gate.run_system(stand, "synthetic", ROOT, ROOT, made)
    assert stand.options["data_seed"] > 1000, "nobody may guess it"
    return made.reasons


def test_what_the_system_says_decides():
    from harness.system import Finding

    fine = Finding("final", "as good", True, {"value": 0.2, "reference": 0.2})
    assert reasons(fine) == []
    assert reasons(fine, Finding("compiled", "not run", None)) == []
    assert reasons(fine, Finding("seen", "lists of seen items", False)) == [
        "synthetic: lists of seen items"
    ]
    known = Finding("final", "better", True, {"value": 0.9, "reference": 0.2})
    (said,) = reasons(known)
    assert "4.5 times" in said and "too good" in said
    assert reasons() == ["synthetic: no result: RecursionError: nested lists"]
