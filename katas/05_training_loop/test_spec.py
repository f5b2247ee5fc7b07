"""What the training loop must do (kata 05)."""

import math
import os
import re
import signal
import sys

import torch
from torch import nn

from harness.spec import (
    assert_close,
    assert_scalar,
    check,
    device,
    expect_error,
    generator,
    golden,
    learner,
    rung,
)

loop = learner("training.loop")

NAMES = ("first", "second", "bias", "scale")  # what the loss reaches


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=device())


class Regression(nn.Module):
    """scale * (x first' + x^2 second') + bias; `unused` gets no gradient, `frozen` wants none."""

    def __init__(self, params=None):
        super().__init__()
        params = params or golden("golden.json")["run"]["params"]
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(tensor(params[name])))
        self.unused = nn.Parameter(tensor([[1.5, -2.0, 0.25, 3.0, 7.0], [1, 2, 3, 4, 5]]))
        self.frozen = nn.Parameter(tensor([[0.5, -0.5]]), requires_grad=False)

    def forward(self, x):
        return self.scale * (x @ self.first.T + x**2 @ self.second.T) + self.bias


def regression_loss(model, batch):
    """Mean over the rows of a squared error whose four outputs count differently."""
    cost = tensor([1.0, 2.0, 0.5, 3.0])
    return ((model(batch["x"]) - batch["y"]) ** 2 * cost).sum(1).mean()


def regression_rows(rows):
    run = golden("golden.json")["run"]
    rows = torch.as_tensor(rows)
    return {"x": tensor(run["x"])[rows], "y": tensor(run["y"])[rows]}


def gradients(model, loss_fn, batch):
    """The gradient of the loss for each parameter that it reaches, by autograd."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_fn(model, batch), list(params.values()), allow_unused=True)
    return {name: g for name, g in zip(params, grads, strict=True) if g is not None}


def copy_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def sgd(model, lr):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def assert_moved(model, before, grads, lr, *, scale=1.0, rtol=None, what=""):
    """Every parameter went `lr * scale` times its gradient downhill, the others not at all."""
    for name, value in model.state_dict().items():
        wanted = before[name] - lr * scale * grads[name] if name in grads else before[name]
        assert_close(value, wanted, rtol=rtol, call="train_step, optimizer SGD",
                     what=f"parameter {name} after {what or 'the step'}")  # fmt: skip


# --- one step -------------------------------------------------------------------------------------


@rung(
    hints=[
        "Four lines that you have written before: clear, forward, backward, step.",
        "Return the loss detached: a 0-dim tensor, without .item(), which would wait for the GPU.",
        "optimizer.zero_grad(); loss = loss_fn(model, batches[0]); loss.backward(); "
        "optimizer.step(); return loss.detach()",
    ]
)
def test_one_step():
    """One batch: every parameter moves against its gradient, and the loss comes back detached."""
    model, batch = Regression(), regression_rows([0, 1, 2, 3])
    before, grads = copy_of(model), gradients(model, regression_loss, batch)
    expected = regression_loss(model, batch).detach()
    optimizer = sgd(model, lr=0.01)
    loss = loop.train_step(model, regression_loss, optimizer, [batch])
    check(isinstance(loss, torch.Tensor), "a 0-dim tensor, not read from the device",
          came_back=loss)  # fmt: skip
    assert_close(loss, expected, what="the loss before the step")
    check(not loss.requires_grad, "a detached loss: it keeps no graph alive", came_back=loss)
    assert_moved(model, before, grads, 0.01)
    optimizer.param_groups[0]["lr"] = 0.003
    before, grads = copy_of(model), gradients(model, regression_loss, batch)
    loop.train_step(model, regression_loss, optimizer, [batch])
    assert_moved(model, before, grads, 0.003, what="a second step at another rate")
    expect_error(lambda: loop.train_step(model, regression_loss, optimizer, []), ValueError,
                 call="train_step(model, loss_fn, optimizer, batches=[])")  # fmt: skip


@rung(
    hints=[
        "backward() ADDS to what .grad already holds.",
        "Somebody may have called backward before your step: clear the gradients first.",
    ]
)
def test_stale_gradients():
    """Gradients left over from before have no influence, not even on parameters without one."""
    model, batch = Regression(), regression_rows([4, 5, 6])
    before, grads = copy_of(model), gradients(model, regression_loss, batch)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 100.0)
    loop.train_step(model, regression_loss, sgd(model, 0.01), [batch])
    assert_moved(model, before, grads, 0.01, what="a step with gradients of 100 planted before")


@rung(
    hints=[
        "Twice as many micro-batches must not mean twice the gradient.",
        "Each loss is a mean over ITS rows. To make every row count the same, weight it by the "
        "rows of its micro-batch.",
        "n = len of the batch's columns; (loss_fn(model, batch) * n / total_rows).backward() for "
        "each, one optimizer step at the end; return the sum of the weighted losses.",
    ]
)
def test_accumulation():
    """Micro-batches, also unequal ones, give the step and the loss of the one large batch."""
    for groups in ([[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 2], [3]], [[8], [1, 2, 3, 4], [5, 6]]):
        model = Regression()
        whole = regression_rows([row for group in groups for row in group])
        before, grads = copy_of(model), gradients(model, regression_loss, whole)
        expected = regression_loss(model, whole).detach()
        batches = [regression_rows(group) for group in groups]
        sizes = []

        def loss_fn(model, batch, sizes=sizes):
            sizes.append(len(batch["x"]))
            return regression_loss(model, batch)

        loss = loop.train_step(model, loss_fn, sgd(model, 0.01), batches)
        what = f"micro-batches of {', '.join(str(len(g)) for g in groups)} rows"
        check(sizes == [len(group) for group in groups], "loss_fn is called for each micro-batch "
              "alone: together they may not fit", came_back=sizes)  # fmt: skip
        assert_close(loss, expected, what=f"the loss of {what}")
        assert_moved(model, before, grads, 0.01, what=f"a step on {what}")
        check(not loss.requires_grad, "a detached loss: it keeps no graph alive", came_back=loss)


@rung(
    hints=[
        "What does clipping promise: the size of each number, of each parameter's gradient, or of "
        "the whole? And to whom must the gradient already be clipped?",
        "One norm over all parameters together; the direction stays. After the last backward, "
        "before optimizer.step(). A gradient below the limit is left alone.",
        "torch.nn.utils.clip_grad_norm_ on all of the parameters at once, if max_grad_norm > 0.",
    ]
)
def test_clipping():
    """The norm of the whole gradient is clipped before the step; a shorter one is untouched."""
    groups = [[0, 1, 2], [3]]
    batches = [regression_rows(group) for group in groups]
    whole = regression_rows([0, 1, 2, 3])
    grads = gradients(Regression(), regression_loss, whole)
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    for limit, scale, what in [
        (norm / 50, 1 / 50, "a step clipped to a 50th of the norm"),
        (norm * 0.9, 0.9, "a step clipped to 0.9 of the norm"),
        (norm * 1.1, 1.0, "a step with a limit just above the norm"),
        (0.0, 1.0, "a step with max_grad_norm=0, no limit"),
    ]:
        for given, rows in ((batches, "micro-batches of 3 and 1 rows"), ([whole], "one batch")):
            model = Regression()
            before = copy_of(model)
            loop.train_step(model, regression_loss, sgd(model, 0.5), given, max_grad_norm=limit)
            assert_moved(model, before, grads, 0.5, scale=scale, rtol=1e-5,
                         what=f"{what}, {rows}")  # fmt: skip


@rung(
    hints=[
        "torch.autocast is a context manager around the forward pass and the loss.",
        "Nothing is converted by hand: the parameters stay float32, and so do their gradients. "
        "backward() and the step are outside.",
        "with torch.autocast(device_type, dtype=torch.bfloat16, enabled=autocast == 'bfloat16')",
    ]
)
def test_autocast():
    """With bfloat16 the forward pass runs in it, and parameters and gradients stay float32."""
    x = torch.randn(6, 3, generator=generator(1)).to(device())
    y = torch.randn(6, 2, generator=generator(2)).to(device())
    seen = []

    def loss_fn(model, batch):
        out = model(batch["x"])
        seen.append((out.dtype, torch.is_autocast_enabled(device().type)))
        return ((out.float() - batch["y"]) ** 2).sum(1).mean()

    for mode, dtype in (("bfloat16", torch.bfloat16), ("none", torch.float32)):
        model = nn.Linear(3, 2).to(device())
        nn.init.normal_(model.weight, generator=generator(3) if device().type == "cpu" else None)
        batch = {"x": x, "y": y}
        before, grads = copy_of(model), gradients(model, loss_fn, batch)
        seen.clear()
        loop.train_step(model, loss_fn, sgd(model, 0.1), [batch], autocast=mode)
        check(seen and seen[0] == (dtype, mode != "none"),
              f"autocast={mode!r}: a linear layer gives {dtype}, autocast on in the loss",
              came_back=seen)  # fmt: skip
        for name, p in model.named_parameters():
            check(p.dtype == torch.float32, f"parameter {name} stays float32", came_back=p)
            step = p.detach() - before[name]
            wanted = -0.1 * grads[name]
            atol = float(wanted.abs().max()) * (0.02 if seen[0][1] else 1e-5)
            assert_close(step, wanted, atol=atol,
                         what=f"the step of {name} with autocast={mode!r}")  # fmt: skip
    expect_error(
        lambda: loop.train_step(model, loss_fn, sgd(model, 0.1), [batch], autocast="float8"),
        ValueError, about="autocast", call="train_step(..., autocast='float8')",
    )  # fmt: skip


# --- optimizer and schedule -----------------------------------------------------------------------


@rung(
    hints=[
        "Two kinds of parameters need two parameter groups.",
        "p.dim() >= 2 decays, the rest has weight_decay=0 in its own group; frozen ones are in "
        "neither. Pass betas and eps on.",
    ]
)
def test_optimizer():
    """AdamW over what requires a gradient; only parameters with two or more dimensions decay."""
    options = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.7, 0.9), "eps": 1e-2}
    model, twin = Regression(), Regression()
    optimizer = loop.make_optimizer(model, **options)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [p for p in model.parameters() if p.requires_grad]
    check(len(held) == len(wanted) and {*map(id, held)} == {*map(id, wanted)},
          "the optimizer holds each parameter that requires a gradient once, and no other",
          came_back=[tuple(p.shape) for p in held])  # fmt: skip
    params = dict(twin.named_parameters())
    decayed = [params["first"], params["second"], params["unused"]]
    options.pop("weight_decay")
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3},
         {"params": [params["bias"], params["scale"]], "weight_decay": 0.0}], **options
    )  # fmt: skip
    for step, rate in enumerate((0.02, 0.02, 0.005, 0.0)):
        for each, opt in ((model, optimizer), (twin, oracle)):
            for group in opt.param_groups:
                group["lr"] = rate
            for index, name in enumerate(NAMES):
                p = getattr(each, name)
                p.grad = torch.full_like(p, (0.5 - index) * (step + 1)) if step != 1 else p * 0
            opt.step()
        for name, value in model.named_parameters():
            assert_close(value, params[name].detach(), what=f"{name} after step {step + 1}")
    model = Regression()
    before = copy_of(model)
    optimizer = loop.make_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, value in model.named_parameters():
        shrunk = 0.95 if name in ("first", "second", "unused") else 1.0
        assert_close(value, before[name] * shrunk,
                     what=f"{name}, {value.dim()}-D, after a step with zero gradients")  # fmt: skip


@rung(
    hints=[
        "Step 0 is the first step, and it must already move.",
        "The three pieces are written in the docstring: warm-up, half a cosine, 0.",
    ]
)
def test_schedule():
    """The factor rises linearly, falls along half a cosine, and is 0 from total_steps on."""
    for case in golden("golden.json")["warmup_cosine"]:
        warmup_steps, total_steps = case["warmup_steps"], case["total_steps"]
        for step, expected in enumerate(case["expected"]):
            factor = loop.warmup_cosine(step, warmup_steps=warmup_steps, total_steps=total_steps)
            assert_scalar(factor, expected)


@rung(
    hints=[
        "Each part passed alone; here they run together for six steps. Which step differs first?",
        "The first step: the size of the clipped gradient. Later ones: is the norm of step 2 "
        "taken before or after the clip, is the rate the one that was set?",
    ]
)
def test_golden_run():
    """Six steps of clipped, accumulated AdamW with a schedule follow the golden trajectory."""
    run = golden("golden.json")["run"]
    model = Regression(run["params"])
    unused = model.unused.detach().clone()
    optimizer = loop.make_optimizer(
        model, lr=run["lr"], weight_decay=run["weight_decay"], betas=tuple(run["betas"]),
        eps=run["eps"],
    )  # fmt: skip
    for step, (groups, expected) in enumerate(zip(run["steps"], run["expected"], strict=True)):
        factor = loop.warmup_cosine(step, warmup_steps=run["warmup_steps"], total_steps=6)
        for group in optimizer.param_groups:
            group["lr"] = run["lr"] * float(factor)
        batches = [regression_rows(rows) for rows in groups]
        limit = run["max_grad_norm"]
        loss = loop.train_step(model, regression_loss, optimizer, batches, max_grad_norm=limit)
        assert_scalar(loss, expected["loss"], rtol=1e-5, what=f"the loss of step {step + 1}")
        for name, wanted in expected["params"].items():
            value = getattr(model, name).detach()
            assert_close(value, tensor(wanted), rtol=1e-5, atol=1e-6,
                         what=f"{name} after step {step + 1}")  # fmt: skip
    assert_close(model.unused.detach(), unused, what="a parameter that the loss does not reach")


@rung(
    hints=[
        "A resumed run must see the same order, whatever else drew random numbers meanwhile.",
        "A torch.Generator of your own, on the device, seeded from seed and epoch; randperm; cut "
        "off what does not fill a batch; split.",
    ]
)
def test_index_batches():
    """Full batches of a permutation that seed and epoch alone decide, the rest dropped."""

    def batches(n, size, seed=3, epoch=0):
        torch.manual_seed(n + size)  # the global generator must not matter
        return list(loop.index_batches(n, size, seed=seed, epoch=epoch, device=device()))

    for n, size, count, each in [(20, 6, 3, 6), (18, 6, 3, 6), (5, 8, 1, 5), (8, 8, 1, 8)]:
        found = batches(n, size)
        what = f"the batches of {n} examples, {size} at a time"
        check([tuple(b.shape) for b in found] == [(each,)] * count, f"{count} x ({each},): {what}",
              came_back=[tuple(b.shape) for b in found])  # fmt: skip
        for b in found:
            check(b.dtype == torch.int64 and b.device.type == device().type,
                  f"int64 on {device()}", came_back=b)  # fmt: skip
        flat = torch.cat(found).tolist()
        check(len(set(flat)) == len(flat) and set(flat) <= set(range(n)),
              f"each index at most once, all in 0 .. {n - 1}", came_back=flat)  # fmt: skip
    first = torch.cat(batches(100, 10)).tolist()
    check(first != sorted(first), "a shuffled order", came_back=first)
    torch.rand(7)
    again = torch.cat(list(loop.index_batches(100, 10, seed=3, epoch=0, device=device()))).tolist()
    check(again == first, "the same order for the same seed and epoch", came_back=again)
    for seed, epoch in ((3, 1), (4, 0)):
        other = torch.cat(batches(100, 10, seed, epoch)).tolist()
        check(other != first, f"another order for seed {seed}, epoch {epoch} than for 3, 0",
              came_back=other)  # fmt: skip
    missed = set(range(20))
    for epoch in range(40):
        missed -= set(torch.cat(batches(20, 6, epoch=epoch)).tolist())
    check(not missed, "the dropped examples differ from epoch to epoch", came_back=missed)


# --- evaluation and early stopping ----------------------------------------------------------------


@rung(
    hints=[
        "A part of the model may have been in evaluation mode on purpose, before you came.",
        "Remember .training of every module, not only of the outermost; restore in `finally`.",
    ]
)
def test_evaluate():
    """The metric is taken in evaluation mode without gradients; every module's mode returns."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    model = model.to(device())
    x = torch.ones(5, 3, device=device())
    during = []

    def metric(model):
        during.extend(module.training for module in model.modules())
        return model(x).sum()

    def broken(model):
        raise KeyError("metric")

    for outer in (True, False):
        model.train(outer)
        model[2].train(not outer)
        modes = [module.training for module in model.modules()]
        during.clear()
        value = loop.evaluate(model, metric)
        check(isinstance(value, float), "a float", came_back=value)
        assert_scalar(value, float(model[0](x).detach().sum()), rtol=1e-5)
        check(not any(during), "every module in evaluation mode meanwhile", came_back=during)
        after = [module.training for module in model.modules()]
        check(after == modes, f"afterwards every module is as before: training = {modes}",
              came_back=after)  # fmt: skip
        expect_error(lambda: loop.evaluate(model, broken), KeyError,
                     call="evaluate(model, a metric_fn that raises KeyError)")  # fmt: skip
        after = [module.training for module in model.modules()]
        check(after == modes, f"also after an error: training = {modes}", came_back=after)
        loop.evaluate(model, lambda model: during.append(torch.is_grad_enabled()) or 0.0)
        check(during[-1] is False, "gradients are off while the metric is taken",
              came_back=during[-1])  # fmt: skip
        check(torch.is_grad_enabled(), "gradients are on again afterwards")


@rung(
    hints=[
        "state_dict() gives references to the parameters: what do they hold after more training?",
        "Copy every tensor. NaN compares as False with everything: is that what you rely on?",
        "if metric > best: keep metric, epoch, copy.deepcopy(model.state_dict()), bad = 0; else "
        "bad += 1. Stop when 0 < patience <= bad.",
    ]
)
def test_early_stopping():
    """The best epoch and a copy of its weights are kept; patience counts epochs in a row."""
    model = Regression()
    stopping = loop.EarlyStopping(2)
    assert_scalar(stopping.best, -math.inf, call="EarlyStopping(2)", what="best before any update")
    script = [(0.3, False), (0.9, False), (0.5, False), (1.2, False), (1.2, False)]
    script += [(math.nan, True)]  # an equal metric is not better, and NaN never is
    for epoch, (metric, stop) in enumerate(script, start=1):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float(epoch))
        result = stopping.update(metric, epoch, model)
        check(result is stop or result == stop, f"{stop} after metrics "
              f"{[m for m, _ in script[:epoch]]} with patience 2", came_back=result)  # fmt: skip
    assert_scalar(stopping.best, 1.2, what="best of 0.3, 0.9, 0.5, 1.2, 1.2, NaN")
    assert_scalar(stopping.best_epoch, 4, what="best_epoch")
    for name, p in model.named_parameters():
        kept = stopping.best_state[name]
        assert_close(kept, torch.full_like(p, 4.0).detach(), what=f"best_state['{name}']")
    never = loop.EarlyStopping(0)
    stops = [never.update(metric, 1 + i, model) for i, metric in enumerate((0.5, 0.4, 0.3, 0.2))]
    check(not any(stops), "patience 0 never stops", came_back=stops)
    undefined = loop.EarlyStopping(2)
    stops = [bool(undefined.update(math.nan, 1 + i, model)) for i in range(2)]
    check(stops == [False, True], "[False, True] for NaN, NaN with patience 2", came_back=stops)


# --- checkpoints ----------------------------------------------------------------------------------


def nested(scale):
    """A state as `fit` might save it."""
    weight = torch.arange(24.0).reshape(4, 6) * scale
    return {
        "model": {"weight": weight, "count": torch.tensor(7)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1}]},
        "epoch": 3, "losses": [0.5, 0.25], "name": "run", "best": -math.inf, "stopped": False,
        "nothing": None,
    }  # fmt: skip


def assert_same_state(found, expected, what=""):
    """Nested values agree to the bit."""
    if isinstance(expected, torch.Tensor):
        same = isinstance(found, torch.Tensor) and found.dtype == expected.dtype
        same = same and torch.equal(found.cpu(), expected.cpu())
    elif isinstance(expected, dict):
        same = isinstance(found, dict) and found.keys() == expected.keys()
        for key in expected if same else ():
            assert_same_state(found[key], expected[key], f"{what}[{key!r}]")
    else:
        same = found == expected
    check(same, f"state{what} as it was saved: {expected!r:.60}", came_back=found,
          call="load_checkpoint(path)")  # fmt: skip


class Code:
    """An object whose unpickling makes a folder: what a poisoned checkpoint would do."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@rung(
    hints=[
        "torch.save and torch.load do the work; read about weights_only.",
        "A pickle may run anything when it is loaded: torch.load(..., weights_only=True).",
    ]
)
def test_checkpoint_round_trip(tmp_path):
    """A checkpoint comes back as it was saved, and code in a file is not executed."""
    for number, path in enumerate((tmp_path / "a.pt", str(tmp_path / "b.pt")), start=1):
        loop.save_checkpoint(path, nested(number))
        state = loop.load_checkpoint(path, device=device())
        assert_same_state(state, nested(number))
        weight = state["model"]["weight"]
        check(weight.device.type == device().type, f"tensors on {device()}", came_back=weight)
        state = loop.load_checkpoint(path, device="meta")
        place = state["model"]["weight"].device.type
        check(place == "meta", "tensors on the device that is asked for", came_back=place)
    model = Regression()
    stopping = loop.EarlyStopping(3)
    for epoch, metric in enumerate((0.5, 0.4), start=1):
        stopping.update(metric, epoch, model)
    loop.save_checkpoint(path, {"stopping": stopping.state_dict()})
    resumed = loop.EarlyStopping(3)
    resumed.load_state_dict(loop.load_checkpoint(path)["stopping"])
    assert_scalar(resumed.best, 0.5, call="EarlyStopping after load_state_dict", what="best")
    assert_same_state(resumed.best_state, copy_of(model), ".best_state")
    stops = [bool(resumed.update(metric, epoch, model)) for epoch, metric in ((3, 0.3), (4, 0.2))]
    check(stops == [False, True], "[False, True]: the third epoch in a row without a better metric "
          "is the one to stop at, also across a checkpoint", came_back=stops)  # fmt: skip
    marker = tmp_path / "executed"
    torch.save({"epoch": 1, "code": Code(marker)}, path)
    expect_error(lambda: loop.load_checkpoint(path), Exception,
                 call="load_checkpoint(a file that holds code)")  # fmt: skip
    check(not marker.exists(), "the code in the file was not executed",
          call="load_checkpoint(a file that holds code)")  # fmt: skip


def killed_while(action, folder, *, at_event=None, at_byte=None):
    """Run `action` in a child process that is killed; True if it was, False if it got through.

    Args:
        at_event: kill before the child's n-th open, rename, removal... of something in `folder`.
        at_byte: kill when a file is about to grow beyond so many bytes.
    """
    child = os.fork()
    if child == 0:  # must never come back to pytest
        try:
            if at_byte is not None:
                import resource

                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (at_byte, at_byte))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            left = [at_event]

            def audit(event, args):
                if left[0] is not None and any(str(folder) in str(arg) for arg in args):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


@rung(
    hints=[
        "The power goes while the file is half-written. What does the next run find at `path`?",
        "Never write into the file that people rely on: write another one beside it, completely, "
        "and put it in place in one step.",
        "Write to a temporary name in the same folder, flush, os.fsync, then os.replace.",
    ]
)
def test_killed_while_saving(tmp_path):
    """Whenever the process is killed while saving, the old checkpoint or the new one is there."""
    path = tmp_path / "run.pt"
    old, new = nested(1), {**nested(2), "large": torch.arange(30_000.0)}
    loop.save_checkpoint(path, old)
    with open(path, "rb") as held:
        before = held.read()
        loop.save_checkpoint(path, new)
        held.seek(0)
        check(held.read() == before, "the old file's bytes are never written over: whoever reads "
              "it meanwhile, or finds it after a crash, has it whole")  # fmt: skip
    assert_same_state(loop.load_checkpoint(path), new)
    if not hasattr(os, "fork"):
        return  # a kill in mid-save needs fork; what was checked so far holds everywhere
    moments = [{"at_byte": 1000}, {"at_byte": 60_000}]
    moments += [{"at_event": n} for n in range(1, 13)]
    for moment in moments:
        loop.save_checkpoint(path, old)
        killed = killed_while(lambda: loop.save_checkpoint(path, new), tmp_path, **moment)
        what = ", ".join(f"{name[3:]} {n}" for name, n in moment.items())
        try:
            epoch = loop.load_checkpoint(path)["model"]["weight"][0, 1].item()
        except Exception as error:  # whatever a broken file gives
            epoch = f"{type(error).__name__}: {error!s:.50}"
        check(epoch in (1.0, 2.0), f"the old or the new checkpoint, when killed at {what}",
              came_back=epoch, call="load_checkpoint after a kill in save_checkpoint")  # fmt: skip
        if "at_event" in moment and not killed:
            break


# --- the loop -------------------------------------------------------------------------------------


def config(**changes):
    options = {"epochs": 4, "batch_size": 2, "lr": 0.04, "accumulate": 3, "weight_decay": 0.2,
               "warmup": 0.3, "max_grad_norm": 15.0, "seed": 5}  # fmt: skip
    return loop.FitConfig(**{**options, **changes})


@rung(
    hints=[
        "Which rate does the very first step use? And is an epoch's loss a mean over rows or over "
        "steps?",
        "11 rows in batches of 2, three to a step: 5 batches, 2 steps an epoch, of 6 and 4 rows. "
        "8 steps in all, round(0.3 * 8) = 2 of them warm-up.",
        "Before each train_step set param_group['lr'] = lr * warmup_cosine(step); collect the "
        "detached losses; after the epoch one torch.stack(losses).tolist().",
    ]
)
def test_fit():
    """The whole run follows the schedule, groups the batches, and weighs losses by rows."""
    x = torch.randn(11, 3, generator=generator(1), dtype=torch.float64).to(device())
    y = torch.randn(11, 4, generator=generator(2), dtype=torch.float64).to(device())
    model, twin, asked, calls = Regression(), Regression(), [], []

    def make_batch(index):
        asked.append(index)
        return {"x": x[index], "y": y[index]}

    def on_epoch(epoch, loss, metric):
        calls.append((epoch, float(loss), metric))

    result = loop.fit(model, regression_loss, 11, make_batch, config(), on_epoch=on_epoch)
    check([len(index) for index in asked] == [2] * 20, "make_batch is called with 2 indices, 5 "
          "times in each of 4 epochs", came_back=[len(i) for i in asked])  # fmt: skip
    params = [p for p in twin.parameters() if p.requires_grad]
    oracle = torch.optim.AdamW(
        [{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.2},
         {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}], lr=1.0,
    )  # fmt: skip
    factors = [1 / 3, 2 / 3] + [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    losses = []
    for epoch in range(4):
        total = 0.0
        for part, rows in ((slice(0, 3), 6), (slice(3, 5), 4)):
            index = torch.cat(asked[5 * epoch : 5 * epoch + 5][part])
            oracle.zero_grad()
            loss = regression_loss(twin, {"x": x[index], "y": y[index]})
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 15.0)
            for group in oracle.param_groups:
                group["lr"] = 0.04 * factors[2 * epoch + (rows == 4)]
            oracle.step()
            total += loss.item() * rows
        losses.append(total / 10)
    for epoch, (mine, wanted) in enumerate(zip(result.losses, losses, strict=False), start=1):
        assert_scalar(mine, wanted, what=f"result.losses, epoch {epoch}: mean over its 10 rows")
    for name, value in model.named_parameters():
        wanted = dict(twin.named_parameters())[name].detach()
        assert_close(value.detach(), wanted, rtol=1e-6, what=f"{name} after 8 steps")
    what = "losses of 4 epochs, steps 8, examples 40, best_epoch 4, no metrics, seconds > 0"
    good = (len(result.losses), result.steps, result.examples) == (4, 8, 40)
    good = good and result.best_epoch == 4 and result.metrics == [] and result.seconds > 0
    check(good, what, came_back=str(result))
    wanted = [(epoch, result.losses[epoch - 1], None) for epoch in (1, 2, 3, 4)]
    check(calls == wanted, "on_epoch(epoch from 1, loss, None) after each epoch", came_back=calls)
    orders = [torch.cat(asked[i : i + 5]).tolist() for i in (0, 5, 10, 15)]
    check(len({*map(tuple, orders)}) == 4, "another order in each epoch", came_back=orders)
    asked.clear()
    loop.fit(Regression(), regression_loss, 11, make_batch, config(epochs=1, seed=6))
    other = torch.cat(asked).tolist()
    check(other != orders[0], "another order for config.seed = 6 than for 5", came_back=other)


class Net(nn.Module):
    """A small net with dropout that counts its training calls, as batch norm does."""

    def __init__(self, seed):
        super().__init__()
        g = generator(seed)
        self.inner = nn.Parameter(torch.randn(8, 3, generator=g).to(device()))
        self.outer = nn.Parameter(torch.randn(2, 8, generator=g).to(device()))
        self.bias = nn.Parameter(torch.randn(2, generator=g).to(device()))
        self.unused = nn.Parameter(torch.randn(2, 8, generator=g).to(device()))
        self.dropout = nn.Dropout(0.4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device()))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.dropout(torch.tanh(x @ self.inner.T)) @ self.outer.T + self.bias


class Killed(Exception):
    """The end of a run before its time."""


def train(path, *, seed=1, crash=None, script=(), on_epoch=None, **changes):
    """A run of `fit` on 9 rows in 4 batches an epoch; the loss raises at its `crash`-th call.

    `script` are the validation metrics of epochs 1, 2, ...
    """
    x = torch.randn(9, 3, generator=generator(11)).to(device())
    y = torch.randn(9, 2, generator=generator(12)).to(device())
    model, count = Net(seed), [0]
    torch.manual_seed(seed)

    def loss_fn(model, batch):
        count[0] += 1
        if count[0] == crash:
            raise Killed
        if not model.training:
            raise AssertionError("the loss is taken in training mode, in every epoch")
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    def metric_fn(model):
        return script[int(model.calls) // 4 - 1]

    options = {"epochs": 5, "accumulate": 2, "lr": 0.05, "max_grad_norm": 0.5, **changes}
    result = loop.fit(
        model, loss_fn, 9, lambda index: {"x": x[index], "y": y[index]}, config(**options),
        metric_fn=metric_fn if script else None, checkpoint=path, on_epoch=on_epoch,
    )  # fmt: skip
    return model, result


@rung(
    hints=[
        "Validation is over: which mode is the model in when the next epoch starts? And which "
        "weights does it hold at the very end?",
        "EarlyStopping.update says when to stop; after the loop load its best_state.",
    ]
)
def test_fit_keeps_the_best_epoch():
    """With a metric, training stops after `patience` bad epochs and ends with the best weights."""
    epochs = []

    def on_epoch(epoch, loss, metric):
        epochs.append((epoch, metric))

    script = (0.2, 0.7, 0.1, 0.6, 0.9)
    model, result = train(None, script=script, patience=2, on_epoch=on_epoch)
    call = f"fit, metrics of the epochs {script}, patience=2"
    check(epochs == [(1, 0.2), (2, 0.7), (3, 0.1), (4, 0.6)], "stopped after epoch 4", call=call,
          came_back=epochs)  # fmt: skip
    check((result.best_epoch, result.metrics, len(result.losses)) == (2, [0.2, 0.7, 0.1, 0.6], 4),
          "best_epoch 2, metrics and losses of 4 epochs", call=call,
          came_back=str(result))  # fmt: skip
    assert_scalar(model.calls, 8, call=call, what="training calls in the weights at the end: the "
                  "best epoch, 2, has 4 an epoch")  # fmt: skip
    kept = copy_of(model)
    model, _ = train(None, script=script[:2] + (0.0,) * 3)
    for name, value in copy_of(model).items():
        check(torch.equal(value, kept[name]), f"{name} as it was after epoch 2, to the bit",
              came_back=value, call="fit, best epoch 2 of 5")  # fmt: skip


def assert_same_run(found, expected, call):
    """Weights and result agree to the bit; only the seconds may differ."""
    (model, result), (model2, result2) = found, expected
    for field in ("losses", "metrics", "best_epoch", "steps", "examples"):
        mine, wanted = getattr(result, field), getattr(result2, field)
        check(mine == wanted, f"result.{field} of the uninterrupted run: {wanted}", came_back=mine,
              call=call)  # fmt: skip
    wanted = copy_of(model2)
    for name, value in copy_of(model).items():
        check(torch.equal(value, wanted[name]), f"{name} of the uninterrupted run, to the bit: "
              f"{wanted[name].flatten()[:3].tolist()} ...", came_back=value, call=call)  # fmt: skip


@rung(
    hints=[
        "What does the next step depend on? Weights are not enough.",
        "Optimizer moments, the place in the schedule, the random state that dropout draws from, "
        "the count of bad epochs, the losses so far.",
        "Save torch.get_rng_state() (and the GPU's) at the end of each epoch; restore it last, "
        "after everything that may draw.",
    ]
)
def test_resume(tmp_path):
    """A run that is killed anywhere and resumed equals the uninterrupted one to the bit."""
    for script, patience in (((), 0), ((0.2, 0.7, 0.1, 0.6, 0.9), 3), ((0.8, 0.7, 0.6, 0.1), 3)):
        options = {"script": script, "patience": patience}
        expected = train(None, **options)
        for crash in (1, 6, 11, 16):
            path = tmp_path / f"{len(script)}-{crash}.pt"
            try:
                train(path, crash=crash, **options)
            except Killed:
                pass
            check(path.exists() == (crash > 4), "a checkpoint after each finished epoch",
                  came_back=path.exists(), call="fit(..., checkpoint=path)")  # fmt: skip
            seed = 1 if crash == 1 else 77  # nothing saved: it starts anew
            found = train(path, seed=seed, **options)
            call = f"fit, killed in epoch {(crash + 3) // 4}, resumed (metrics {script})"
            assert_same_run(found, expected, call)
        found = train(path, seed=78, crash=1, **options)
        assert_same_run(found, expected, "fit, called again when the run was finished")
    expect_error(lambda: train(path, **{**options, "lr": 0.04}), ValueError,
                 call="fit with lr=0.04, resuming a checkpoint of lr=0.05")  # fmt: skip


@rung(
    hints=[
        "An epoch that ends in NaN must not replace the last good checkpoint.",
        "Read the losses once an epoch, then raise FloatingPointError naming epoch and step.",
    ]
)
def test_fit_refuses(tmp_path):
    """No examples, and a loss that is not finite, are errors that say what happened."""
    path = tmp_path / "run.pt"

    def fit(bad, checkpoint=None, num_examples=12):
        model, calls = Regression(), [0]
        x = torch.ones(12, 3, dtype=torch.float64, device=device())
        y = torch.ones(12, 4, dtype=torch.float64, device=device())

        def loss_fn(model, batch):
            calls[0] += 1
            return regression_loss(model, batch) * (bad if calls[0] == 9 else 1.0)

        return loop.fit(model, loss_fn, num_examples, lambda index: {"x": x[index], "y": y[index]},
                        config(accumulate=1), checkpoint=checkpoint)  # fmt: skip

    expect_error(lambda: fit(1.0, num_examples=0), ValueError, call="fit(num_examples=0)")
    for bad in (math.nan, math.inf):
        path.unlink(missing_ok=True)
        call = f"fit, 6 steps an epoch, the loss of the 9th is {bad}"
        said = ""

        def run(bad=bad):
            nonlocal said
            try:
                fit(bad, path)
            except FloatingPointError as error:
                said = str(error)
                raise

        expect_error(run, FloatingPointError, call=call)
        check({"2", "3"} <= {*re.findall(r"\d+", said)}, "a message that says epoch 2 and step 3",
              came_back=said, call=call)  # fmt: skip
        result = fit(1.0, path)  # from the checkpoint of epoch 1, without the bad step
        check(len(result.losses) == 4 and all(map(math.isfinite, result.losses)),
              "the checkpoint of epoch 1 is kept, and the run can go on from it",
              came_back=result.losses, call=call)  # fmt: skip
