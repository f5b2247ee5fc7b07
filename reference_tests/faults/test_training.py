"""Training that is killed, poisoned, or resumed from what is not its checkpoint."""

from __future__ import annotations

import json
import random
import time

import pytest

from harness import warm

RUN = "reference_tests.faults.training_run:main"


@pytest.fixture
def parent(monkeypatch):
    """A process with torch imported, from which a run starts in a tenth of a second."""
    if not warm.available():
        pytest.skip("this system cannot fork")
    monkeypatch.setattr(warm, "USUAL", ("torch", "numpy", "torch.optim", "torch._dynamo"))
    with warm.Warm() as process:
        yield process


def trained(parent, folder, timeout):
    """Start a run or go on with it; what came out, None if it was killed before its end."""
    folder.mkdir(exist_ok=True)
    reason, output = parent.call(RUN, [str(folder)], folder / "results", timeout)
    assert not reason or "took longer" in reason, output
    return json.loads((folder / "done.json").read_text()) if not reason else None


def test_killed_at_random_moments(parent, tmp_path, tally, often):
    """SIGKILL, wherever it is: the run that goes on ends with the same weights to the bit."""
    expected = trained(parent, tmp_path / "whole", 60)
    began = time.monotonic()
    again = trained(parent, tmp_path / "again", 60)
    seconds = time.monotonic() - began
    assert again == expected, "two uninterrupted runs differ"
    rng, kills, runs = random.Random(0), 0, 0
    while kills < often(12, 120):
        folder, found, mine = tmp_path / f"run{runs}", None, 0
        while found is None:
            # towards the end of a long row of kills a run is left alone
            found = trained(parent, folder, rng.uniform(0.02, seconds) if mine < 40 else 60)
            if found is None:
                mine += 1
                half = [file for file in folder.iterdir() if file.suffix == ".tmp"]
                for file in half:
                    file.unlink()
                where = "while a checkpoint was written" if half else "elsewhere"
                tally("SIGKILL at random moments of training", f"{where}: resumed")
        assert found == expected, f"after {mine} kills"
        kills, runs = kills + mine, runs + 1
    tally("such runs at their end, against an uninterrupted one", "the same to the bit", runs)
