"""`kata run` from the outside: what it leaves behind, and how it ends when something is wrong."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from harness.paths import ROOT
from harness.run import one_thread

QUICK = [
    "retrieval.fit.epochs=1",
    "ranking.fit.epochs=1",
    "cold_start.epochs=1",
    "compile.measure=false",
    "serving.requests=40",
]
KEYS = {  # of report.json: other programs read them, so none goes away
    "data": ["name", "users", "items", "interactions", "split", "ties"],
    "baselines": ["popularity"],
    "retrieval": [
        "hit_rate@10",
        "ndcg@10",
        "mrr@10",
        "recall@100",
        "train_seconds",
        "train_examples_per_second",
        "peak_memory_mb",
    ],
    "ranking": ["auc", "logloss", "normalized_entropy", "train_seconds", "shuffled_ndcg@10"],
    "final": ["hit_rate@10", "ndcg@10", "mrr@10"],
    "cold_start": ["items", "recall@10", "encoder", "floors"],
    "index": ["kind", "recall_vs_exact@10", "cpu_ms_per_query"],
    "compile": ["graph_breaks", "graphs", "speedup"],
    "serving": [
        "requests",
        "errors",
        "p50_ms",
        "p99_ms",
        "cpu_ms_per_request",
        "cpu_ms_per_empty_request",
    ],
}


def run(*arguments, cwd=ROOT):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "harness", "run", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = [part for setting in QUICK for part in ("--set", setting)]
    done = run("--impl", "reference", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return done, out, json.loads((out / "report.json").read_text())


def test_every_fixed_key_is_there_and_measured_or_explained(finished):
    _, _, report = finished
    for key in ("impl", "seed", "device", "config", "versions", "seconds"):
        assert report[key] is not None, key
    for section, keys in KEYS.items():
        for key in keys:
            assert key in report[section], (section, key)
            if report[section][key] is None:
                assert report[section]["reason"], (section, key)
    assert {"hit_rate@10", "ndcg@10"} <= set(report["baselines"]["popularity"])
    assert {"random", "content"} <= set(report["cold_start"]["floors"])
    unmeasured = [section for section in KEYS if "reason" in report[section]]
    assert unmeasured == ["compile"]  # switched off above


def test_the_figures_are_figures(finished):
    _, _, report = finished
    assert report["serving"]["errors"] == 0
    assert report["serving"]["requests"] == 80
    assert report["index"]["recall_vs_exact@10"] == 1.0
    assert 0 < report["final"]["ndcg@10"] <= report["final"]["hit_rate@10"] <= 1
    assert report["ranking"]["shuffled_ndcg@10"] < report["final"]["ndcg@10"]
    assert report["retrieval"]["peak_memory_mb"] > 50


def test_where_the_seconds_went(finished):
    _, out, report = finished
    phases = {phase["name"]: phase["seconds"] for phase in report["phases"]}
    assert {"load", "train retrieval", "candidate features", "cold start", "serve"} <= set(phases)
    assert min(phases.values()) >= 0
    assert sum(phases.values()) == pytest.approx(report["seconds"], abs=0.1)
    # two models are trained, and the report has the seconds of the second
    assert phases["train retrieval"] > report["retrieval"]["train_seconds"]
    assert phases["the rest"] < 0.5 * report["seconds"]  # imports, slow on a busy machine
    assert 0 < report["cpu_seconds"]
    assert "| train retrieval | " in (out / "report.md").read_text()


def test_it_leaves_a_report_plots_curves_and_lists(finished):
    _, out, _ = finished
    for name in ("report.md", "training.png", "quality.png", "lists.npz"):
        assert (out / name).stat().st_size > 1000, name
    assert list((out / "tensorboard").iterdir())
    text = (out / "report.md").read_text()
    assert text.count("Watched next:") == 3
    assert "`training/losses.py`: reference" in text


def test_it_ends_in_a_table_the_report_and_what_to_do_next(finished):
    done, out, _ = finished
    lines = done.stdout.splitlines()
    assert any(line.startswith("final ") for line in lines)
    assert str(out / "report.md") in done.stdout
    assert lines[-1].startswith("Next:")
    assert max(map(len, lines[:-3])) <= 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "no-such-data"], "no data set"),
        (["--config", "no-such-config"], "ml-100k"),
        (["--set", "retrieval.no_such_key=1"], "retrieval.fit.epochs=5"),
        (["--set", "retrieval.fit.epochs"], "KEY=VALUE"),
        (["--device", "no-such-device"], "cannot be used here"),
        (["--impl", "no-such-folder"], "no folder"),
    ],
)
def test_wrong_use_is_told_in_a_sentence(arguments, words, tmp_path):
    done = run("--out", tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name",
    ["default", "synthetic", "ml-100k", "ml-latest-small", "ml-1m", "ml-1m-sequence"],
)
def test_every_configuration_of_a_run_is_whole(name):
    from harness.run import lacks, load_config

    _, config = load_config(name, "", [])
    assert lacks(config) == []
    del config["cold_start"]["factors"], config["serving"]
    assert lacks(config) == ["cold_start.factors", "serving"]


def test_a_configuration_that_lacks_a_key_is_refused_before_the_training(tmp_path):
    whole = (ROOT / "configs" / "synthetic.yaml").read_text(encoding="utf-8")
    part = tmp_path / "part.yaml"
    part.write_text(re.sub(r"(?m)^  factors:.*\n", "", whole), encoding="utf-8")
    done = run("--out", tmp_path / "out", "--config", part)
    assert done.returncode == 2, done.stderr
    assert "part.yaml lacks cold_start.factors: a run needs" in done.stderr
    assert "train" not in done.stdout


def test_a_stub_is_told_where_to_write(tmp_path):
    done = run("--impl", ROOT / "src", "--out", tmp_path)
    assert done.returncode == 1
    assert "write run in src/recsys/pipeline.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_broken_learner_code_is_shown_where_it_broke(tmp_path):
    file = tmp_path / "own" / "recsys" / "training" / "losses.py"
    file.parent.mkdir(parents=True)
    file.write_text("def in_batch_softmax_loss(*a, **k):\n    return nothing\n\n"
                    "full_softmax_loss = in_batch_softmax_loss\n")  # fmt: skip
    done = run("--impl", "own", "--impl", "reference", "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "NameError" in done.stderr
    assert "own/recsys/training/losses.py:2 in_batch_softmax_loss" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("given", "expected"), [(None, 1), ("2", 2)])
def test_one_thread_unless_more_are_asked_for(given, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        one_thread(torch.device("cpu"))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
