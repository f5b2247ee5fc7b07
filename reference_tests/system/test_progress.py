"""The curves of a run: TensorBoard always, Weights & Biases where the configuration asks for it."""

import sys
import types

import pytest

from harness.errors import UsageError
from harness.progress import Reporter


class Wandb(types.ModuleType):
    """Stands for the package: remembers what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.defined, self.points, self.finished = [], [], [], []

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, point):
        self.points.append(point)

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def run(folder, config, stages=("train retrieval", "train ranker")):
    with Reporter(folder) as reporter:
        reporter.track(config, "first")
        for stage in stages:
            for step in range(2):
                reporter.log(stage, "loss", 1.0 / (step + 1), step)


def test_tensorboard_is_enough(tmp_path, wandb):
    run(tmp_path, {"ties": "row"})
    run(tmp_path, {"tracking": "tensorboard"})
    assert list(tmp_path.iterdir()) and not wandb.started


def test_weights_and_biases_gets_the_same_curves(tmp_path, wandb):
    config = {"tracking": "wandb", "seed": 3}
    run(tmp_path, config)
    (settings,) = wandb.started
    assert settings["project"] == "recsys-katas" and settings["name"] == "first"
    assert settings["config"] == config and settings["dir"] == str(tmp_path)
    # each stage counts its own epochs: wandb's own step may never go back
    assert wandb.defined == [
        ("train_retrieval/*", "train_retrieval/epoch"),
        ("train_ranker/*", "train_ranker/epoch"),
    ]
    assert wandb.points[1] == {"train_retrieval/loss": 0.5, "train_retrieval/epoch": 1}
    assert len(wandb.points) == 4 and wandb.finished == [0]
    assert list(tmp_path.glob("events*")), "TensorBoard's curves are kept as well"


def test_a_run_that_fails_is_said_to_have_failed(tmp_path, wandb):
    with pytest.raises(ZeroDivisionError), Reporter(tmp_path) as reporter:
        reporter.track({"tracking": "wandb"}, "first")
        raise ZeroDivisionError
    assert wandb.finished == [1]


def test_what_is_missing_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Reporter(tmp_path) as reporter:
        with pytest.raises(UsageError, match="pip install -c constraints.txt wandb"):
            reporter.track({"tracking": "wandb"}, "first")
        with pytest.raises(UsageError, match="tensorboard or wandb, not 'mlflow'"):
            reporter.track({"tracking": "mlflow"}, "first")
