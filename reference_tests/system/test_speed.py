"""`kata bench --speed`: what it counts and compares is what it says."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness import cli
from harness.bench.speed import Times, evaluation, keep, ratios, spread, step, training
from harness.paths import ROOT
from harness.phases import Phases


@pytest.fixture(scope="module")
def data(reference):
    from harness.run import load_config
    from recsys.data.splits import make_split
    from recsys.data.synthetic import generate
    from recsys.pipeline import RetrievalData

    dataset = generate(0, users=40, items=60)
    _, config = load_config(None, "synthetic", [])
    rows = make_split(dataset, "leave_last_one_out", ties="row", seed=0).train
    return RetrievalData(dataset, rows, config["retrieval"], torch.device("cpu"))


def test_the_data_loaders_give_the_same_examples(data):
    index = torch.arange(0, len(data.positions), 7)
    expected = data.example_batch(index)
    for kind in (training.Examples, training.TensorExamples):
        rows = kind(data)
        found = torch.utils.data.default_collate([rows[int(i)] for i in index])
        assert found.keys() == expected.keys()
        for name, column in expected.items():
            assert torch.equal(found[name], column), name
    for loader in training.loaders(data, 30, 10).values():
        batches = list(loader)
        assert [len(batch["target"]) for batch in batches] == [10, 10, 10]
        seen = sorted(torch.cat([batch["target"] for batch in batches]).tolist())
        assert seen == sorted(data.example_batch(torch.arange(30))["target"].tolist())


def test_the_work_of_operations_is_counted():
    a, b, out = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    table, index = torch.ones(1000, 4), torch.tensor([3, 1])
    with step.Counter() as counter:
        a @ b
        out.add_(1)
        torch.nn.functional.embedding(index, table)
        out.t()  # a view: nothing to do
    found = {work.operation: (work.bytes, work.flops) for work in counter.done}
    assert found == {
        "mm": (4 * (15 + 35 + 21), 2 * 3 * 5 * 7),
        "add_": (4 * (21 + 21), 0),
        "embedding": (4 * (8 + 8) + 16, 0),
    }
    work = [step.Work("copy", 100, 0), step.Work("mm", 10, 3000)]
    assert step.bound(work, copy_rate=50, matmul_rate=1000) == 2 + 3


def test_times_are_compared_within_a_round():
    assert ratios([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == [2.0, 3.0, 2.0]
    assert spread([3.0, 1.0, 2000.0]) == "3.0 (1.0 to 2,000.0)"
    times = Times()
    times.cpu, times.wall = [1.0], [2.0]
    assert times.own(torch.device("cpu")) == [1.0]
    assert times.own(torch.device("cuda")) == [2.0]


def test_a_section_takes_the_place_of_its_former_self(tmp_path):
    path = tmp_path / "speed.md"
    keep(path, "Training", ["old"])
    keep(path, "Growth", ["line"])
    text = path.read_text()
    keep(path, "Training", ["new"])
    assert path.read_text() == text.replace("old", "new")
    path.write_text(path.read_text() + "\n## By hand\nstays\n")
    keep(path, "Growth", ["other"])
    assert path.read_text() == (
        "# Speed\n\n## Training\nnew\n\n## Growth\nother\n\n## By hand\nstays\n"
    )


def test_evaluation_agrees_with_the_peers_that_are_there(data, monkeypatch):
    monkeypatch.setattr(evaluation, "PEERS", {"no_such_library": None} | evaluation.PEERS)
    args = cli.parser().parse_args(["bench", "--speed", "--rounds", "1"])
    args.device = torch.device("cpu")
    lines = evaluation.measure(args, users=30, items=50)
    assert any(line.startswith("| `ndcg_at_k`, from scores | ") for line in lines)
    assert "no_such_library is not installed." in lines


def test_memory_that_was_freed_is_kept():
    code = (
        "import resource, sys\nimport numpy as np\nfrom harness import memory\n"
        "print(memory.keep() if sys.argv[1] == 'keep' else None)\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10):\n"
        "        x, y = np.empty(4_000_000), np.empty(4_000_000)\n"
        "        x[:] = 1; y[:] = 2; del x, y\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(faults())\n"
    )
    told, found = {}, {}
    for word in ("keep", "leave"):
        command = [sys.executable, "-c", code, word]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        told[word], found[word] = done.stdout.split()
    if told["keep"] == "False":
        pytest.skip("this system cannot be told")
    assert int(found["keep"]) < int(found["leave"]) / 10


def test_phases_do_not_count_twice(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("harness.phases.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def pass_by(seconds):
        now[0] += seconds

    def train_ranker():
        pass_by(3)
        pipeline.retrieve(1)

    pipeline = SimpleNamespace(retrieve=pass_by, train_ranker=train_ranker)
    phases = Phases()
    with phases.of(pipeline):
        pipeline.train_ranker()
        pipeline.retrieve(5)
        pass_by(7)
        with phases("cold start", whole=True):
            pipeline.train_ranker()
    pipeline.retrieve(100)  # nobody times it any more
    assert phases.seconds == {"train ranker": 3, "retrieve candidates": 6, "cold start": 4}
    assert phases.report(20)[-1] == {"name": "the rest", "seconds": 7}


@pytest.mark.parametrize("options", [["--speed", "swiftness"], ["--speed", "--rounds", "0"]])
def test_usage(options, capsys):
    assert cli.main(["bench", *options]) == cli.USAGE
    assert "--" in capsys.readouterr().err
