"""Training that is killed, poisoned, or resumed from what is not its checkpoint."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch

from harness import overlay, warm
from harness.paths import REFERENCE, ROOT
from reference_tests.faults import training_run

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
    while kills < often(8, 100):
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


# --- in this process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop():
    """Kata 05's reference as `recsys.training.loop`."""
    with overlay.using(overlay.resolve([str(REFERENCE)], ROOT)):
        from recsys.training import loop

        yield loop


def fitted(loop, path, *, poison=None, **changes):
    """`fit` with a checkpoint; `poison(epoch, step, loss, model, batch)` gives another loss."""
    model, loss_fn, rows, make_batch, config, _ = training_run.setting(accumulate=1, **changes)
    calls = iter(range(1_000_000))

    def poisoned(model, batch):
        epoch, step = divmod(next(calls), rows // config.batch_size)
        loss = loss_fn(model, batch)
        return poison(epoch + 1, step + 1, loss, model, batch) if poison else loss

    loop.fit(model, poisoned, rows, make_batch, config, checkpoint=path)
    return model


def at(epoch, step, change):
    def poison(now, place, loss, model, batch):
        return change(loss, model, batch) if (now, place) == (epoch, step) else loss

    return poison


class Broken(torch.autograd.Function):
    """The identity, with another gradient (the square root at 0, and the like)."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, ctx.gradient), None


def broken_gradient(gradient):
    """Of the row of one user: the loss stays as it is."""
    return lambda loss, model, batch: (
        loss + 0 * Broken.apply(model.user.weight[batch["user"][0]], gradient).sum()
    )


POISONS = {
    "NaN in the data": lambda loss, model, batch: (loss * torch.tensor([1.0, math.nan])).mean(),
    "infinity in the data": lambda loss, model, batch: (loss + math.inf * batch["label"]).mean(),
    "a loss that is NaN": lambda loss, model, batch: loss * math.nan,
    "a loss that is infinite": lambda loss, model, batch: loss + math.inf,
    "a gradient that is NaN, of a finite loss": broken_gradient(math.nan),
    "a gradient that is infinite, of a finite loss": broken_gradient(math.inf),
}


@pytest.mark.parametrize("what", POISONS)
@pytest.mark.parametrize("step", [1, 7, 16])
def test_what_is_not_finite_is_named(loop, tmp_path, what, step, tally):
    """In the first, a middle or the last step: an error names the place; the state before stays."""
    path = tmp_path / "run.pt"
    fitted(loop, path, epochs=2)
    assert loop.load_checkpoint(path)["epochs"] == 2
    path.unlink()
    gradient = "gradient" in what
    with pytest.raises(FloatingPointError) as error:
        fitted(loop, path, epochs=4, poison=at(3, step, POISONS[what]))
    said = str(error.value)
    assert "epoch 3" in said, said
    if not gradient:
        assert re.search(rf"step {step}\b", said), said
    elif "NaN" in what and step < 16:  # clipping spreads it: every later loss is NaN
        assert re.search(rf"step {step + 1}\b.*the step before", said), said
    else:
        assert "user.weight" in said, said
    state = loop.load_checkpoint(path)
    assert state["epochs"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    tally(f"{what}: first, middle and last step of an epoch",
          "epoch and step named, the state before kept" if not gradient else
          "the step after it named, or else the weights; the state before kept")
    fitted(loop, path, epochs=4)  # goes on from there
    assert loop.load_checkpoint(path)["epochs"] == 4


def test_a_checkpoint_of_something_else_is_refused(loop, tmp_path, tally):
    """Another model, configuration or version: what differs is said, and nothing is taken over."""
    path = tmp_path / "run.pt"
    fitted(loop, path, epochs=1)
    whole = loop.load_checkpoint(path)

    def less(table, *names):
        return {key: value for key, value in table.items() if key not in names}

    model = whole["model"]
    wide = model | {"out.weight": torch.ones(1, 99)}
    others = {
        "another configuration": (whole | {"config": whole["config"] | {"lr": 0.5}}, "lr.*0.5"),
        "a model with a part less": (whole | {"model": less(model, "out.bias")}, "out.bias"),
        "a model with a part more": (whole | {"model": model | {"x.w": model["out.bias"]}}, "x.w"),
        "a model of another width": (whole | {"model": wide}, r"out.weight.*99"),
        "a version without early stopping": (less(whole, "stopping"), "stopping"),
        "a version that knows more": (whole | {"config": whole["config"] | {"ema": 1}}, "ema"),
        "only weights": (model, "config"),
        "a list": ([1, 2], "checkpoint"),
    }
    for what, (state, difference) in others.items():
        torch.save(state, path)
        mine, loss_fn, rows, make_batch, config, _ = training_run.setting(accumulate=1, epochs=1)
        before = training_run.digest(mine)
        with pytest.raises(ValueError, match=difference) as error:
            loop.fit(mine, loss_fn, rows, make_batch, config, checkpoint=path)
        assert str(path) in str(error.value), what
        assert training_run.digest(mine) == before, f"{what}: the model was changed"
        tally("checkpoints of another model, configuration or version",
              "refused with the difference, the model as it was")


class Bomb:
    """Makes a file when it is unpickled, in one of the ways that there are."""

    def __init__(self, how, path):
        self.how, self.path = how, path

    def __reduce__(self):
        return self.how(self.path)


def _write(path):
    Path(path).write_text("executed")


BOMBS = {
    "os.system": lambda path: (os.system, (f"touch {path}",)),
    "eval": lambda path: (eval, (f"open({str(path)!r}, 'w')",)),
    "exec": lambda path: (exec, (f"open({str(path)!r}, 'w')",)),
    "open": lambda path: (open, (str(path), "w")),
    "subprocess": lambda path: (subprocess.call, (["touch", str(path)],)),
    "own function": lambda path: (_write, (str(path),)),
    "pathlib": lambda path: (Path.touch, (path,)),
    "getattr": lambda path: (getattr, (path, "touch")),
}
PLACES = {
    "as the checkpoint": lambda bomb, whole: bomb,
    "as a weight": lambda bomb, whole: whole | {"model": whole["model"] | {"out.bias": bomb}},
    "as a key": lambda bomb, whole: whole | {"more": {"a": [bomb]}},
}


def test_loading_never_executes_code(loop, tmp_path, tally):
    """torch.save's zip, its old format, and a bare pickle; the bomb as anything in it."""
    path, marker = tmp_path / "run.pt", tmp_path / "executed"
    fitted(loop, path, epochs=1)
    whole = loop.load_checkpoint(path)
    for how in BOMBS.values():
        for place in PLACES.values():
            state = place(Bomb(how, marker), whole)
            for form in ("zip", "old", "pickle"):
                if form == "pickle":
                    path.write_bytes(pickle.dumps(state))
                else:
                    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
                with pytest.raises(Exception):  # noqa: B017, of what kind is torch's business
                    loop.load_checkpoint(path)
                assert not marker.exists()
                tally("checkpoints that hold code", "an error, and nothing was executed")


def test_a_checkpoint_that_is_cut_off(loop, tmp_path, tally, often):
    """By somebody else: `save_checkpoint` leaves no such file."""
    path = tmp_path / "run.pt"
    fitted(loop, path, epochs=1)
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(often(20, 200)):
        path.write_bytes(content[: rng.randrange(len(content))])
        with pytest.raises(Exception):  # noqa: B017
            loop.load_checkpoint(path)
        tally("checkpoints cut off at any byte", "an error")
