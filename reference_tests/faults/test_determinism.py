"""The same seed gives the same figures; how far the number of threads changes them is stated."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from harness.paths import ROOT

SETTINGS = ["retrieval.fit.epochs=2", "ranking.fit.epochs=1", "cold_start.epochs=1"]
SETTINGS += ["compile.measure=false", "serving.requests=10"]
# times and memory, not figures
MEASURED = {"seconds", "train_seconds", "train_examples_per_second", "peak_memory_mb"}
MEASURED |= {"cpu_seconds", "date", "serving", "compile", "cpu_ms_per_query", "out"}
TOLERANCE = 0.02  # of NDCG and the like on 1,000 users, where sums are taken in another order


def run(out, threads, seed=0):
    """Figures of `kata run` with the reference, by path; without what a clock measured."""
    command = [sys.executable, "-m", "harness", "run", "--impl", "reference", "--seed", str(seed)]
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    done = subprocess.run(
        [*command, "--out", str(out), *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(figures(json.loads((out / "report.json").read_text())))


def figures(value, path=""):
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in MEASURED:
                yield from figures(each, f"{path}/{key}")
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from figures(each, f"{path}/{place}")
    else:
        yield path, value


def test_the_same_seed_gives_the_same_figures(tmp_path, tally, often):
    if not often(0, 1):
        pytest.skip("in the long form: three runs of the pipeline")
    first, again = run(tmp_path / "a", 1), run(tmp_path / "b", 1)
    assert first == again
    tally("`kata run` twice with one seed, one thread", "the same figures, to the last digit")
    two = run(tmp_path / "c", 2)
    numbers = {path: value for path, value in first.items() if type(value) is float}
    apart = max(abs(two[path] - value) for path, value in numbers.items()
                if "@" in path or "auc" in path)  # fmt: skip
    assert apart <= TOLERANCE
    tally("`kata run` with one thread and with two",
          f"NDCG, HR, MRR, recall and AUC at most {apart:.4f} apart (allowed: {TOLERANCE})")
    other = run(tmp_path / "d", 1, seed=1)
    assert any(other[path] != value for path, value in numbers.items())
    tally("`kata run` with another seed", "other figures")
