"""What the diagnosis asks the training loop (kata 05)."""

import builtins
import math
import os
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from harness.cost import count
from harness.devices import other_device_findings
from harness.probe import probe
from harness.spec import device, learner

loop = learner("training.loop")


def numbers(*shape, phase=0.0):
    """Irregular numbers between -2 and 2, the same on every device and for every version."""
    size = math.prod(shape)
    flat = [2 * math.sin(1.7 * i * i + i + phase) for i in range(size)]
    return torch.tensor(flat, dtype=torch.float64, device=device()).reshape(shape)


class Line(nn.Module):
    """s * (x w') + bias, with a parameter of each number of dimensions, a frozen one, a counter."""

    def __init__(self):
        super().__init__()
        self.w, self.bias = nn.Parameter(numbers(2, 3)), nn.Parameter(numbers(2, phase=1))
        self.s = nn.Parameter(numbers(1, phase=2).reshape(()))
        self.frozen = nn.Parameter(numbers(1, 2, phase=3), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device()))

    def forward(self, x):
        self.calls += 1
        return self.s * (x @ self.w.T) + self.bias


def loss_fn(model, batch):
    return ((model(batch["x"]) - batch["y"]) ** 2 * numbers(2, phase=4).abs()).sum(1).mean()


def rows(start, stop):
    return {"x": numbers(9, 3, phase=5)[start:stop], "y": numbers(9, 2, phase=6)[start:stop]}


def params(model):
    return {name: getattr(model, name).detach().clone() for name in ("w", "bias", "s")}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def outcome_of(action):
    """The type of the error that `action` raises, for its message is free."""
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "accepted"


PARTS = ((0, 3), (3, 4), (4, 6))  # unequal micro-batches


# --- one step -------------------------------------------------------------------------------------


def stepped(parts, *, old=False, limit=0.0, steps=1):
    """What steps of SGD leave; gradients of 3 are there before if `old`."""
    model = Line()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    for p in trained(model):
        p.grad = torch.full_like(p, 3.0) if old else None
    losses = []
    for _ in range(steps):
        losses.append(loop.train_step(
            model, loss_fn, optimizer, [rows(*part) for part in parts], max_grad_norm=limit
        ))  # fmt: skip
    kinds = [type(loss).__name__ for loss in losses]
    return {**params(model), "losses": [float(loss) for loss in losses], "kinds": kinds}


@probe
def one_batch():
    """Two steps on one batch."""
    return stepped([(0, 4)], steps=2)


@probe
def old_gradients():
    """A step on one batch with gradients left over."""
    return stepped([(0, 4)], old=True)


@probe
def micro_batches():
    """A step on micro-batches of 3, 1 and 2 rows."""
    return stepped(PARTS)


@probe
def equal_micro_batches():
    """A step on micro-batches of 2 rows each."""
    return stepped([(0, 2), (2, 4), (4, 6)])


@probe
def clipped():
    """Steps on unequal micro-batches, clipped to a part of the norm, and hardly."""
    return [stepped(PARTS, limit=limit) for limit in (0.3, 5.0)]


@probe
def hardly_clipped():
    """A step with a limit far above the norm."""
    return stepped([(0, 4)], limit=1e4)


@probe
def clipped_groups():
    """A clipped step of an optimizer with two groups that holds a part of the model."""
    model = Line()
    model.frozen.grad = torch.full_like(model.frozen, 50.0)
    optimizer = torch.optim.SGD([{"params": [model.w]}, {"params": [model.s]}], lr=0.1)
    loop.train_step(model, loss_fn, optimizer, [rows(0, 4)], max_grad_norm=0.3)
    return params(model)


@probe
def passes():
    """The order of forward and backward, the rows of each, whether the loss keeps its graph."""
    told, model = [], Line()

    def told_loss(model, batch):
        told.append(f"forward {len(batch['x'])}")
        loss = loss_fn(model, batch)
        loss.register_hook(lambda gradient: told.append("backward"))
        return loss

    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    loss = loop.train_step(model, told_loss, optimizer, [rows(*part) for part in PARTS])
    return {"order": told, "graph": int(getattr(loss, "requires_grad", False))}


@probe
def mode():
    """A step in evaluation mode."""
    modes, model = [], Line().eval()

    def told_loss(model, batch):
        modes.append(int(model.training))
        return loss_fn(model, batch)

    loop.train_step(model, told_loss, torch.optim.SGD(trained(model), lr=0.1), [rows(0, 4)])
    return [*modes, int(model.training)]


@probe
def no_batches():
    """A step without batches."""
    model = Line()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    return outcome_of(lambda: loop.train_step(model, loss_fn, optimizer, []))


def precision_of(mode, default=torch.float16):
    told, model = [], nn.Linear(2, 2, bias=False).to(device())
    with torch.no_grad():
        model.weight.copy_(numbers(2, 2))

    def told_loss(model, batch):
        out = model(batch["x"])
        told.append(f"{out.dtype} {torch.is_autocast_enabled(device().type)}")
        return out.float().square().mean()

    batch = {"x": numbers(3, 2, phase=1).float()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    usual = torch.get_autocast_dtype(device().type)
    torch.set_autocast_dtype(device().type, default)
    try:
        loop.train_step(model, told_loss, optimizer, [batch, batch], autocast=mode)
    finally:
        torch.set_autocast_dtype(device().type, usual)
    return {"told": told, "weight": str(model.weight.dtype)}


@probe
def half_precision():
    """A step with autocast, where its default is that of a GPU, and that of a CPU."""
    return [precision_of("bfloat16", default) for default in (torch.float16, torch.bfloat16)]


@probe
def unknown_precision():
    """A step with a precision that there is not."""
    told = []
    outcome = outcome_of(lambda: told.extend(precision_of("float8")["told"]))
    return {"outcome": outcome, "told": told}


def small_loss(model, batch):
    return model(batch["x"]).square().mean()


@probe
def waits_of_a_step():
    """What a step waits for, without a limit, above and below it."""

    def steps(place):
        model = nn.Linear(3, 2).to(place)
        batches = [{"x": torch.ones(3, 3).to(place)}, {"x": torch.ones(2, 3).to(place)}]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run():
            for limit in (0.0, 1e-3, 1e4):
                loop.train_step(model, small_loss, optimizer, batches, max_grad_norm=limit)

        return run

    found = other_device_findings(steps)
    return {"waits": len(found.cost.syncs), "for": sorted({*found.cost.syncs}),
            "findings": len(found.findings)}  # fmt: skip


# --- schedule and optimizer -----------------------------------------------------------------------


@probe
def schedule():
    """The factors of short runs."""
    return [
        [float(loop.warmup_cosine(step, warmup_steps=warmup, total_steps=total))
         for step in range(total + 3)]
        for warmup, total in ((3, 9), (0, 4), (3, 3), (1, 3))
    ]  # fmt: skip


def moved(model, steps, **options):
    """What AdamW makes of given gradients."""
    optimizer = loop.make_optimizer(model, **options)
    for step in range(steps):
        for index, p in enumerate(trained(model)):
            p.grad = numbers(*p.shape, phase=index + step) * 0.1**step
        optimizer.step()
    return params(model)


@probe
def optimizer_steps():
    """Four steps with betas and eps of its own."""
    return moved(Line(), 4, lr=0.1, weight_decay=0.3, betas=(0.6, 0.8), eps=0.05)


@probe
def optimizer_defaults():
    """Three steps with what is the default, at another rate."""
    return moved(Line(), 3, lr=0.2)


@probe
def optimizer_at_rest():
    """A step with gradients of 0, and what the optimizer holds."""
    model = Line()
    optimizer = loop.make_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in trained(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = sorted(p.numel() for group in optimizer.param_groups for p in group["params"])
    return {**params(model), "held": held}


@probe
def optimizer_of_a_shared_layer():
    """Two steps on a layer that is in the model twice."""
    layer = nn.Linear(2, 2).double().to(device())
    with torch.no_grad():
        layer.weight.copy_(numbers(2, 2))
        layer.bias.copy_(numbers(2, phase=1))
    optimizer = loop.make_optimizer(nn.Sequential(layer, layer), lr=0.1, weight_decay=0.2)
    for phase in (2, 3):
        for p in layer.parameters():
            p.grad = numbers(*p.shape, phase=phase)
        optimizer.step()
    return [layer.weight, layer.bias]


@probe
def optimizer_kernels():
    """Whether a step takes more operations for more parameters."""
    operations = []
    for number in (2, 5):
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(number)]).to(device())
        optimizer = loop.make_optimizer(model, lr=0.1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        operations.append(count(optimizer.step).operations)
    return int(operations[1] > operations[0])


# --- batches --------------------------------------------------------------------------------------


def order(n, size, seed=3, epoch=0):
    return list(loop.index_batches(n, size, seed=seed, epoch=epoch, device=device()))


@probe
def shapes_of_batches():
    """How examples are cut into batches: shapes, and how many different indices."""
    found = []
    for n, size in ((20, 6), (18, 6), (5, 8), (8, 8)):
        batches = order(n, size)
        flat = [i for batch in batches for i in batch.tolist()]
        inside = sum(0 <= i < n for i in flat)
        found.append({"rows": [len(batch) for batch in batches], "different": len({*flat}),
                      "inside": inside})  # fmt: skip
    return found


@probe
def place_of_batches():
    """Whether index batches are made on the device that is asked for."""
    run = other_device_findings(
        lambda place: list(loop.index_batches(9, 2, seed=1, epoch=0, device=place))
    )
    return len(run.findings)


@probe
def repeated_order():
    """Whether the order depends on the global random state, or changes it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = torch.cat(order(60, 6)).tolist()
    changed = not torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    return {"changed": int(changed), "repeated": int(torch.cat(order(60, 6)).tolist() == first)}


@probe
def other_orders():
    """Whether batches come back in other epochs, for other seeds, or are not shuffled at all."""
    first = [{*batch.tolist()} for batch in order(60, 6)]
    others = {"epoch": order(60, 6, epoch=1), "seed": order(60, 6, seed=4),
              "both": order(60, 6, seed=2, epoch=2), "none": torch.arange(60).split(6)}  # fmt: skip
    return {
        name: int(max(len(a & {*b.tolist()}) for a in first for b in batches) == 6)
        for name, batches in others.items()
    }


# --- evaluation and early stopping ----------------------------------------------------------------


def nest():
    """Modules of which some are in evaluation mode and some are not."""
    model = nn.Sequential(Line(), nn.Sequential(nn.Dropout(0.5), nn.Identity()))
    model[1][0].eval()
    return model


def modes_of(model):
    return [int(module.training) for module in model.modules()]


@probe
def evaluation():
    """The modes and gradients during evaluation and after it."""
    found = []
    for outer in (nest(), nest().eval()):
        during = []

        def metric(model, during=during):
            during.extend([*modes_of(model), int(torch.is_grad_enabled())])
            return model[0].bias.sum()

        value = loop.evaluate(outer, metric)
        graph = int(getattr(value, "requires_grad", False))
        found.append({"value": float(value), "kind": type(value).__name__, "graph": graph,
                      "during": during, "after": modes_of(outer)})  # fmt: skip
    return found


@probe
def evaluation_with_an_error():
    """The modes and gradients after a metric that raises."""
    model, told = nest(), []

    def broken(model):
        raise KeyError("metric")

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            try:
                loop.evaluate(model, broken)
            except KeyError:
                told.append("KeyError")
            told.append(int(torch.is_grad_enabled()))
    return {"told": told, "after": modes_of(model)}


def followed(patience, metrics, stopping=None, first=1):
    """When it says stop, and what it keeps."""
    model = Line()
    stopping = stopping or loop.EarlyStopping(patience)
    stops = []
    for epoch, metric in enumerate(metrics, start=first):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(epoch)
        stops.append(int(stopping.update(metric, epoch, model)))
    kept = stopping.best_state or {}
    values = {name: float(kept[name].float().mean()) for name in sorted(kept)}
    return {"stops": stops, "best": float(stopping.best), "best_epoch": int(stopping.best_epoch),
            "kept": values}  # fmt: skip


@probe
def patience():
    """When it stops: a few curves."""
    curves = ((2, (0.3, 0.9, 0.5, 1.2, 1.1, 1.0)), (3, (0.4, 0.3, 0.2, 0.1, 0.5)),
              (0, (0.5, 0.4, 0.3)), (1, (0.6, 0.7, 0.65)))  # fmt: skip
    return [followed(*curve) for curve in curves]


@probe
def plateau():
    """A metric that stands still."""
    return [followed(3, (0.4, 0.4, 0.4, 0.4)), followed(2, (0.2, 0.5, 0.5, 0.6)),
            followed(1, (0.4, 0.400001, 0.4))]  # fmt: skip


@probe
def undefined_metric():
    """A metric that is NaN from the start, or on the way."""
    nan = math.nan
    return [followed(2, (nan, nan, nan)), followed(2, (0.4, nan, 0.5, nan, nan))]


@probe
def negative_metric():
    """A metric below 0, one that is 0, and one that recovers a little."""
    return [followed(2, (-3.0, -2.0, -2.5)), followed(1, (0.0, -1.0)),
            followed(2, (0.9, 0.1, 0.2, 0.3))]  # fmt: skip


@probe
def resumed_stopping():
    """Early stopping that goes on from its state."""
    stopping = loop.EarlyStopping(3)
    followed(3, (0.5, 0.4), stopping)
    state = stopping.state_dict()
    followed(3, (0.3, 0.9), stopping, first=3)
    resumed = loop.EarlyStopping(3)
    resumed.load_state_dict(state)
    return followed(3, (0.3, 0.2), resumed, first=3)


# --- checkpoints ----------------------------------------------------------------------------------


def written(folder):
    return [path.name for path in sorted(folder.iterdir()) if ".pt" == path.suffix]


@probe
def checkpoint():
    """What comes back, where, and what else is left in the folder."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.pt"
        for number in (1.0, 2.0):
            loop.save_checkpoint(path, {"w": numbers(2), "epoch": number, "list": [1, None]})
        state = loop.load_checkpoint(str(path))
        place = loop.load_checkpoint(path, device="meta")["w"].device.type
        return {**state, "place": place, "files": len([*Path(name).iterdir()])}


@probe
def checkpoint_in_a_new_folder():
    """Whether folders are made."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "one" / "two" / "a.pt"
        try:
            loop.save_checkpoint(path, {"epoch": 1})
        except (OSError, RuntimeError):
            return "no folder"
        return int(path.exists())


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@probe
def checkpoint_with_code():
    """Whether code in a file is executed, and whether the file is refused."""
    with tempfile.TemporaryDirectory() as name:
        path, marker = Path(name) / "a.pt", Path(name) / "executed"
        torch.save({"epoch": 1, "code": Code(marker)}, path)
        refused = 0
        try:
            loop.load_checkpoint(path)
        except Exception:
            refused = 1
        return {"executed": int(marker.exists()), "refused": refused}


@probe
def checkpoint_that_fails():
    """What is there after a state that cannot be written."""
    with tempfile.TemporaryDirectory() as name:
        path, told = Path(name) / "a.pt", []
        loop.save_checkpoint(path, {"epoch": 1})
        try:
            loop.save_checkpoint(path, {"epoch": 2, "code": lambda: None})
            told.append("no error")
        except Exception:
            told.append("an error")
        try:
            told.append(f"epoch {loop.load_checkpoint(path)['epoch']}")
        except Exception:
            told.append("no checkpoint")
        return {"told": told, "files": len([*Path(name).iterdir()])}


@contextmanager
def looking(path, found):
    """Look at `path` before every C function that is called meanwhile."""

    def look(frame, event, function):
        if event == "c_call":
            found.append(os.stat(path).st_size if os.path.exists(path) else -1)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


@probe
def checkpoint_meanwhile():
    """The old file and the new one while saving: written over, missing, flushed in time."""
    with tempfile.TemporaryDirectory() as name:
        path, found, flushed = Path(name) / "a.pt", [], []
        loop.save_checkpoint(path, {"w": numbers(3000)})

        def noted(file):
            status = os.fstat(file if isinstance(file, int) else file.fileno())
            flushed.append((status.st_ino, os.stat(path).st_ino if path.exists() else 0))

        names = [name for name in ("fsync", "fdatasync") if hasattr(os, name)]
        real = {name: getattr(os, name) for name in names}
        try:
            vars(os).update(dict.fromkeys(names, noted))
            with open(path, "rb") as held:
                before = held.read()
                with looking(path, found):
                    loop.save_checkpoint(path, {"w": numbers(2000)})
                held.seek(0)
                kept = held.read() == before
        finally:
            vars(os).update(real)
        sizes = {len(before), path.stat().st_size}
        in_time = [new == path.stat().st_ino != old for new, old in flushed]
        return {"kept": int(kept), "missing": int(-1 in found),
                "partly": int(not {*found} <= sizes | {-1}), "flushed": int(any(in_time)),
                "flushes": int(bool(flushed))}  # fmt: skip


# --- the loop -------------------------------------------------------------------------------------


class Stop(Exception):
    """The end of a run before its time."""


class Run:
    """A run of `fit` on rows that are all alike, so that their order does not matter.

    What happens is told: modes, precision, batches made ahead, random numbers drawn.
    """

    def __init__(self, n=11, *, script=(), crash=None, bad=None, pause=0.0, path=None, **changes):
        self.model = Line().eval()
        self.asked, self.inside, self.drawn, self.ahead, self.epochs = [], [], [], [], []
        self.script, self.crash, self.bad, self.pause = script, crash, bad, pause
        self.per_epoch = max(1, n // changes.get("batch_size", 2))
        options = {"epochs": 3, "batch_size": 2, "lr": 0.05, "accumulate": 3, "seed": 5,
                   "weight_decay": 0.2, "warmup": 0.35, "max_grad_norm": 3.0}  # fmt: skip
        config = loop.FitConfig(**{**options, **changes})
        metric_fn = self.metric if script else None
        try:
            with mock.patch.object(os, "fsync"):  # which takes its time
                self.result = loop.fit(
                    self.model, self.loss, n, self.batch, config,
                    metric_fn=metric_fn, checkpoint=path, on_epoch=self.told,
                )  # fmt: skip
        except Stop:
            self.result = None

    def batch(self, index):
        self.asked.append(index.tolist())
        return {name: column.expand(len(index), -1) for name, column in rows(0, 1).items()}

    def loss(self, model, batch):
        self.inside.append([int(model.training), int(torch.is_autocast_enabled(device().type))])
        self.ahead.append(len(self.asked) - len(self.ahead))
        self.drawn.append(float(torch.rand(())))
        if len(self.inside) == self.crash:
            raise Stop
        if len(self.inside) in (1, 11):  # in the first epoch and in the third
            time.sleep(6 * self.pause)
        loss = loss_fn(model, batch)
        return loss * self.bad if self.bad is not None and len(self.inside) >= 8 else loss

    def metric(self, model):
        time.sleep(self.pause)
        torch.rand(())
        return self.script[int(model.calls) // self.per_epoch - 1]

    def told(self, epoch, loss, metric):
        self.epochs.append([epoch, float(loss), -1.0 if metric is None else float(metric)])

    def orders(self):
        flat = [i for index in self.asked for i in index]
        size = len(flat) * self.per_epoch // max(1, len(self.asked))
        return [flat[i : i + size] for i in range(0, len(flat), size)]

    def outcome(self):
        """What must be the same for every right solution."""
        result = self.result
        return {**params(self.model), "calls": int(self.model.calls), "losses": list(result.losses),
                "metrics": list(result.metrics), "best_epoch": result.best_epoch,
                "steps": result.steps, "examples": result.examples}  # fmt: skip


@probe
def run():
    """Three epochs of accumulated, clipped steps along the schedule."""
    made = Run()
    return {**made.outcome(), "sizes": [len(index) for index in made.asked], "told": made.epochs}


@probe
def run_of_single_steps():
    """Two epochs, one batch a step; then one epoch of a single step."""
    return [Run(accumulate=1, epochs=2, max_grad_norm=0.0, weight_decay=0.0).outcome(),
            Run(accumulate=5, epochs=1).outcome()]  # fmt: skip


@probe
def run_inside():
    """Modes, precision and batches ahead in the losses of a run."""
    made = Run(autocast="bfloat16", epochs=2)
    modes, precisions = zip(*made.inside, strict=True)
    return {"training": list(modes), "autocast": list(precisions), "ahead": max(made.ahead)}


@probe
def run_orders():
    """Whether the order differs between epochs, and between seeds."""
    one, other = [Run(16, batch_size=4, epochs=2, seed=seed) for seed in (5, 6)]
    return {"epochs": int(one.orders()[0] != one.orders()[1]),
            "seeds": int(one.orders()[0] != other.orders()[0])}  # fmt: skip


@probe
def run_with_validation():
    """Runs whose best epoch is not the last: stopped by patience, and not."""
    found = []
    for script, patience in (((0.2, 0.7, 0.1, 0.6, 0.9), 2), ((0.3, 0.8, 0.5, 0.1, 0.0), 0)):
        made = Run(script=script, patience=patience, epochs=5)
        modes = [mode for mode, _ in made.inside]
        found.append({**made.outcome(), "modes": modes, "epochs": [e[0] for e in made.epochs]})
    return found


@probe
def run_seconds():
    """Whether the clock counts two pauses in a loss, and leaves out those of validation."""
    begin = time.perf_counter()
    seconds = Run(script=(0.1, 0.2, 0.3), pause=0.01).result.seconds
    elapsed = time.perf_counter() - begin
    return {"pauses": int(min(seconds, 0.13) / 0.06), "validation": int(seconds > elapsed - 0.03)}


@probe
def run_on_nothing():
    """A run without examples."""
    return outcome_of(lambda: Run(0))


def broken_run(bad):
    """A run whose loss is not finite from step 3 of epoch 2 on; and once more."""
    with tempfile.TemporaryDirectory() as name:
        path, said, named = Path(name) / "a.pt", "no error", []
        try:
            Run(bad=bad, accumulate=1, path=path)
        except Exception as error:
            said = type(error).__name__
            named = re.findall(r"\d+", str(error))
        told = {"said": said, **{number: int(number in named) for number in ("1", "2", "3")}}
        try:
            again = Run(accumulate=1, path=path)
        except Exception as error:
            return {**told, "again": type(error).__name__}
        finite = sum(map(math.isfinite, again.result.losses))
        return {**told, "steps": len(again.inside), "finite": finite}


@probe
def run_with_nan():
    """A loss that is NaN."""
    return broken_run(math.nan)


@probe
def run_with_infinity():
    """A loss that is infinite."""
    return broken_run(math.inf)


@probe
def waits_of_a_run():
    """How often two epochs of six steps wait for the device, in units of four."""

    def epochs(place):
        model, x = nn.Linear(3, 2).to(place), torch.ones(12, 3).to(place)
        config = loop.FitConfig(epochs=2, batch_size=2, lr=0.1, max_grad_norm=1.0)
        return lambda: loop.fit(model, small_loss, 12, lambda index: {"x": x[index]}, config)

    found = other_device_findings(epochs)
    return {"waits": len(found.cost.syncs) // 4, "findings": len(found.findings)}


def resumed(crash, **options):
    """A run that crashes and goes on: what it is, and where its random numbers are from."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.pt"
        torch.manual_seed(1)
        whole = Run(24, batch_size=8, accumulate=2, epochs=5, **options)
        torch.manual_seed(1)
        Run(24, batch_size=8, accumulate=2, epochs=5, crash=crash, path=path, **options)
        saved = int(path.exists())
        torch.manual_seed(77)
        made = Run(24, batch_size=8, accumulate=2, epochs=5, path=path, **options)
        torch.manual_seed(78)
        again = Run(24, batch_size=8, accumulate=2, epochs=5, path=path, **options)
        place = {number: i for i, number in enumerate(whole.drawn)}
        epochs = {str(order): i for i, order in enumerate(whole.orders())}
        return {
            **made.outcome(), "saved": saved, "told": [epoch[0] for epoch in made.epochs],
            "drawn": [place.get(number, -1) for number in made.drawn],
            "orders": [epochs.get(str(order), -1) for order in made.orders()],
            "again": len(again.inside), "losses again": list(again.result.losses),
            "w again": again.model.w,
        }  # fmt: skip


@probe
def resumed_run():
    """Killed in the third of five epochs, resumed, called once more."""
    return resumed(8)


@probe
def resumed_run_with_validation():
    """Killed in the third epoch; the best was the first, patience ends in the fourth."""
    return resumed(8, script=(0.8, 0.7, 0.6, 0.1, 0.9), patience=3)


@probe
def resumed_run_that_improves():
    """Killed in the fourth epoch; the best is the last."""
    return resumed(11, script=(0.2, 0.7, 0.1, 0.6, 0.9), patience=4)


@probe
def resumed_with_another_rate():
    """A checkpoint of another configuration."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.pt"
        Run(path=path)
        try:
            made = Run(path=path, lr=0.02)
        except ValueError:
            return "refused"
        return {"steps": len(made.inside), **made.outcome()}


# --- beside the model, beside the checkpoint, in another process ----------------------------------


@probe
def held_by_the_optimizer_alone():
    """A parameter of no model, with an old gradient, after a step."""
    beside = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    beside.grad = torch.tensor([30.0, 70.0], dtype=torch.float64)
    model = torch.nn.Linear(2, 1).double()
    rows = {"x": torch.tensor([[0.5, -1.5], [2.0, 0.25]], dtype=torch.float64)}
    weight = torch.tensor([1.0, 3.0], dtype=torch.float64)
    optimizer = torch.optim.SGD([beside, *model.parameters()], lr=0.1)
    loop.train_step(model, lambda m, b: (beside * weight).sum() + 0 * m(b["x"]).sum(), optimizer,
                    [rows])  # fmt: skip
    return beside


@probe
def another_process():
    """Whether the order is that of a process whose hash() is salted otherwise."""
    plain = builtins.hash
    orders = []
    for salt in ("one", "another"):

        def salted(key, salt=salt):
            return plain((salt, key) if "'" in repr(key) else key)

        with mock.patch.object(builtins, "hash", salted):
            batches = loop.index_batches(50, 10, seed=3, epoch=1)
            orders.append(torch.cat(list(batches)).tolist())
    return {"same": orders[0] == orders[1]}


@probe
def where_it_is_written_first():
    """From which folder the checkpoint is moved to its name."""
    moved = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "run.pt"

        def watched(real):
            def move(source, target, *args, **options):
                moved.append(Path(source).resolve().is_relative_to(path.parent))
                return real(source, target, *args, **options)

            return move

        replace = mock.patch.object(os, "replace", watched(os.replace))
        with replace, mock.patch.object(os, "rename", watched(os.rename)):
            loop.save_checkpoint(path, {"epoch": 1})
    return {"beside": all(moved)}
