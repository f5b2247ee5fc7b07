"""Two processes on loopback learn what one process learns from the same global batches."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from harness import distributed
from harness.errors import UsageError
from harness.paths import ROOT

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                          timeout=180)  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes had, by variant."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(HERE / "two_processes.py", folder)
    assert done.returncode == 0, done.stderr
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def one(reference):
    """The same examples in one process, by kata 03 alone."""
    sys.path.insert(0, str(HERE))
    try:
        import two_processes

        from recsys.training.losses import in_batch_softmax_loss

        def train(symmetric):
            model = two_processes.two_towers()
            return two_processes.train(model, in_batch_softmax_loss, lambda index: index, symmetric)

        yield {"right": train(False), "symmetric": train(True)}
    finally:
        sys.path.remove(str(HERE))


def furthest(found, expected):
    """Largest difference of the gradients, in units of the largest gradient of its tensor."""
    return max(
        float((grad - step[name]).abs().max() / step[name].abs().max())
        for now, step in zip(found["grads"], expected["grads"], strict=True)
        for name, grad in now.items()
    )


@pytest.mark.parametrize("variant", ["right", "symmetric"])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_equal_one(one, two, variant, rank):
    expected, found = one[variant], two[f"{variant} {rank}"]
    assert len(found["grads"]) == 6
    assert furthest(found, expected) < 1e-9
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-7, atol=1e-9)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)


@pytest.mark.parametrize(
    "mistake",
    [
        "all_gather without gradient",
        "each process by itself",
        "hits of one's own rows",
        "log q of one's own rows",
    ],
)
def test_a_mistake_shows(one, two, mistake):
    first = {"grads": two[f"{mistake} 0"]["grads"][:1]}
    # a million times what the right ones differ by
    assert furthest(first, {"grads": one["right"]["grads"][:1]}) > 1e-3


def test_the_command_trains_and_judges():
    done = torchrun("-m", "harness.distributed", "--impl", "reference", "--device", "cpu",
                    "--set", "retrieval.fit.epochs=1", "--set", "text.encoder=none")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("2 processes, ")
    assert "validation NDCG@10 0.0" in done.stdout


def test_a_batch_is_shared_in_the_order_of_ranks_or_refused(one):
    from recsys.training.distributed import own_rows

    with mock.patch.multiple("torch.distributed", get_world_size=lambda: 3, get_rank=lambda: 1):
        assert own_rows(torch.arange(6)).tolist() == [2, 3]
        with pytest.raises(ValueError, match="a batch of 7 rows cannot be shared by 3 processes"):
            own_rows(torch.arange(7))


@pytest.mark.parametrize("setting", ["loss=full", "user_tower=attention"])
def test_a_loss_without_in_batch_negatives_is_refused(one, setting):
    args = argparse.Namespace(data="synthetic", seed=0, config=None, set=[f"retrieval.{setting}"])
    with pytest.raises(UsageError, match="in-batch negatives"):
        distributed.train(args, torch.device("cpu"))


def test_without_torchrun_it_says_so():
    command = [sys.executable, "-m", "harness.distributed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "torchrun" in done.stderr and "Traceback" not in done.stderr
