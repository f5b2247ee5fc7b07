"""What the training loop must do (kata 05)."""

import builtins
import functools
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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


@functools.cache
def run():
    return golden("golden.json")["run"]


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=device())


class Regression(nn.Module):
    """scale * (x first' + x^2 second') + bias; `unused` gets no gradient, `frozen` wants none."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, nn.Parameter(tensor(run()["params"][name])))
        self.unused = nn.Parameter(tensor([[1.5, -2.0, 0.25, 3.0, 7.0], [1, 2, 3, 4, 5]]))
        self.frozen = nn.Parameter(tensor([[0.5, -0.5]]), requires_grad=False)
        self.register_buffer("count", tensor([3.0, 4.0]))

    def forward(self, x):
        return self.scale * (x @ self.first.T + x**2 @ self.second.T) + self.bias


def regression_loss(model, batch):
    """Mean over the rows of a squared error whose four outputs count differently."""
    return ((model(batch["x"]) - batch["y"]) ** 2 * tensor(run()["cost"])).sum(1).mean()


def regression_rows(rows):
    return {"x": tensor(run()["x"])[rows], "y": tensor(run()["y"])[rows]}


def gradients(model, loss_fn, batch):
    """The gradient of the loss for each parameter that it reaches, by autograd."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss_fn(model, batch), list(params.values()), allow_unused=True)
    return {name: g for name, g in zip(params, grads, strict=True) if g is not None}


def copy_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def sgd(model, lr):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def assert_moved(model, before, grads, lr, *, scale=1.0, rtol=None, what="the step"):
    """Every parameter went `lr * scale` times its gradient downhill, the others not at all."""
    for name, value in model.state_dict().items():
        wanted = before[name] - lr * scale * grads[name] if name in grads else before[name]
        assert_close(value, wanted, rtol=rtol, call="train_step, optimizer SGD",
                     what=f"{name} after {what}")  # fmt: skip


# --- one step -------------------------------------------------------------------------------------


@rung(
    hints=[
        "Four lines that you have written before: clear, forward, backward, step.",
        "backward() ADDS to what .grad already holds, also when somebody else called it. Return "
        "the loss detached: a 0-dim tensor, without .item(), which would wait for the GPU.",
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
    assert_close(loss, expected, like=expected, what="the loss before the step")
    check(not loss.requires_grad, "a detached loss: it keeps no graph alive", came_back=loss)
    assert_moved(model, before, grads, 0.01)
    optimizer.param_groups[0]["lr"] = 0.003
    before, grads = copy_of(model), gradients(model, regression_loss, batch)
    loop.train_step(model, regression_loss, optimizer, [batch])
    assert_moved(model, before, grads, 0.003, what="a second step at another rate: its own "
                 "gradient counts, not the one of the first step")  # fmt: skip
    model, batch, modes = Regression(), regression_rows([4, 5, 6]), []
    before, grads = copy_of(model), gradients(model, regression_loss, batch)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 100.0)

    def loss_fn(model, batch):
        modes.append(model.training)
        return regression_loss(model, batch)

    model.eval()
    beside = nn.Parameter(tensor([2.0]))  # held by the optimizer alone, as a loss's temperature

    def beside_loss(model, batch):
        return beside.sum() + loss_fn(model, batch)

    beside.grad = tensor([100.0])
    params = [*(p for p in model.parameters() if p.requires_grad), beside]
    loop.train_step(model, beside_loss, torch.optim.SGD(params, lr=0.01), [batch])
    assert_moved(model, before, grads, 0.01, what="a step with gradients of 100 left over before")
    what = "a parameter that only the optimizer holds, gradient 1, after such a step"
    assert_close(beside.detach(), tensor([1.99]), call="train_step, optimizer SGD", what=what)
    check(modes + [model.training] == [False, False], "a model in evaluation mode stays in it",
          came_back=modes + [model.training])  # fmt: skip
    expect_error(lambda: loop.train_step(model, regression_loss, optimizer, []), ValueError,
                 call="train_step(model, loss_fn, optimizer, batches=[])")  # fmt: skip


@rung(
    hints=[
        "Twice as many micro-batches must not mean twice the gradient.",
        "Each loss is a mean over ITS rows. To make every row count the same, weight it by the "
        "rows of its micro-batch. Call backward at once: the sum of all losses would keep all "
        "activations.",
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
        sizes, passes = [], []

        def loss_fn(model, batch, sizes=sizes, passes=passes):
            sizes.append(len(batch["x"]))
            passes.append("forward")
            loss = regression_loss(model, batch)
            loss.register_hook(lambda gradient: passes.append("backward"))
            return loss

        loss = loop.train_step(model, loss_fn, sgd(model, 0.01), batches)
        what = f"micro-batches of {', '.join(str(len(g)) for g in groups)} rows"
        check(sizes == [len(group) for group in groups], "loss_fn is called for each micro-batch "
              "by itself, of these rows", came_back=sizes)  # fmt: skip
        assert_close(loss, expected, like=expected, what=f"the loss of {what}")
        assert_moved(model, before, grads, 0.01, what=f"a step on {what}")
        check(not loss.requires_grad, "a detached loss: it keeps no graph alive", came_back=loss)
        check(passes == ["forward", "backward"] * len(groups), "each backward before the next "
              "forward: one micro-batch in memory at a time", came_back=passes)  # fmt: skip


@rung(
    hints=[
        "What does clipping promise: the size of each number, of each parameter's gradient, or of "
        "the whole? And to whom must the gradient already be clipped?",
        "One norm over all parameters of the optimizer; the direction stays. After the last "
        "backward, before optimizer.step(). A gradient below the limit is left alone.",
        "torch.nn.utils.clip_grad_norm_ on [p for group in optimizer.param_groups for p in "
        "group['params']] at once, if max_grad_norm > 0.",
    ]
)
def test_clipping():
    """The norm of the whole gradient is clipped before the step; a shorter one is untouched."""
    batches = [regression_rows([0, 1, 2]), regression_rows([3])]
    whole = regression_rows([0, 1, 2, 3])
    grads = gradients(Regression(), regression_loss, whole)

    def norm_of(names):
        return math.sqrt(sum(float((grads[name] ** 2).sum()) for name in names))

    norm = norm_of(NAMES)
    for limit, scale, what in [
        (norm / 50, 1 / 50, "a step clipped to a 50th of the norm"),
        (norm * 0.9, 0.9, "a step clipped to 0.9 of the norm"),
        (norm * 1.1, 1.0, "a step with a limit just above the norm"),
        (0.0, 1.0, "a step with max_grad_norm=0, no limit"),
    ]:
        for given, rows in (([whole], "one batch"), (batches, "micro-batches of 3 and 1 rows")):
            model = Regression()
            before = copy_of(model)
            loop.train_step(model, regression_loss, sgd(model, 0.5), given, max_grad_norm=limit)
            assert_moved(model, before, grads, 0.5, scale=scale, rtol=1e-5,
                         what=f"{what}, {rows}")  # fmt: skip
    model, held = Regression(), ("first", "bias")
    before, model.frozen.grad = copy_of(model), torch.full_like(model.frozen, 1e3)
    groups = [{"params": [getattr(model, name)]} for name in held]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    limit = norm_of(held) / 3
    loop.train_step(model, regression_loss, optimizer, [whole], max_grad_norm=limit)
    assert_moved(model, before, {name: grads[name] for name in held}, 0.5, scale=1 / 3, rtol=1e-5,
                 what="a clipped step whose optimizer holds `first` and `bias`, in two groups, "
                 "while `frozen` has an old gradient: one norm over what it holds")  # fmt: skip


@contextmanager
def float16_by_default():
    """Autocast's type, where none is named, is that of a GPU; on the CPU it would be bfloat16."""
    before = torch.get_autocast_dtype(device().type)
    torch.set_autocast_dtype(device().type, torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_dtype(device().type, before)


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
    batch = {"x": x, "y": torch.randn(6, 2, generator=generator(2)).to(device())}
    halves = [{name: column[part] for name, column in batch.items()}
              for part in (slice(0, 4), slice(4, 6))]  # fmt: skip
    seen = []

    def loss_fn(model, batch):
        out = model(batch["x"])
        seen.append((str(out.dtype)[6:], torch.is_autocast_enabled(device().type)))
        return ((out.float() - batch["y"]) ** 2).sum(1).mean()

    for mode, inside in (("bfloat16", ("bfloat16", True)), ("none", ("float32", False))):
        model = nn.Linear(3, 2).to(device())
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator(3)))
        before, grads = copy_of(model), gradients(model, loss_fn, batch)
        seen.clear()
        with float16_by_default():
            loop.train_step(model, loss_fn, sgd(model, 0.1), halves, autocast=mode)
        check(seen == [inside] * 2, f"autocast={mode!r}: a linear layer gives {inside[0]}, and "
              f"torch.is_autocast_enabled() is {inside[1]}", came_back=seen)  # fmt: skip
        for name, p in model.named_parameters():
            for value, whose in ((p, name), (p.grad, f"the gradient of {name}")):
                check(value is None or value.dtype == torch.float32,
                      f"{whose} stays float32 with autocast={mode!r}", came_back=value)  # fmt: skip
            wanted = -0.1 * grads[name]
            atol = float(wanted.abs().max()) * (0.02 if inside[1] else 1e-5)
            assert_close(p.detach() - before[name], wanted, atol=atol,
                         what=f"the step of {name} with autocast={mode!r}")  # fmt: skip
    expect_error(
        lambda: loop.train_step(model, loss_fn, sgd(model, 0.1), halves, autocast="float8"),
        ValueError, about="autocast", call="train_step(..., autocast='float8')",
    )  # fmt: skip


# --- schedule and optimizer -----------------------------------------------------------------------


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
        "Two kinds of parameters need two parameter groups.",
        "p.dim() >= 2 decays, the rest has weight_decay=0 in its own group; frozen ones are in "
        "neither. Pass lr, betas and eps on.",
        "torch.optim.AdamW([{'params': [...], 'weight_decay': weight_decay}, {'params': [...], "
        "'weight_decay': 0.0}], lr=lr, betas=betas, eps=eps, fused=True)",
    ]
)
def test_optimizer():
    """AdamW over what requires a gradient; only parameters with two or more dimensions decay."""
    model = Regression()
    before = copy_of(model)
    optimizer = loop.make_optimizer(model, lr=0.1, weight_decay=0.5)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [p for p in model.parameters() if p.requires_grad]
    check(len(held) == len(wanted) and {*map(id, held)} == {*map(id, wanted)},
          "the optimizer holds each parameter that requires a gradient once, and no other",
          came_back=[tuple(p.shape) for p in held])  # fmt: skip
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, value in model.named_parameters():
        shrunk = 0.95 if name in ("first", "second", "unused") else 1.0
        assert_close(value, before[name] * shrunk, call="make_optimizer(lr=0.1, weight_decay=0.5)",
                     what=f"{name}, {value.dim()}-D, after a step with zero gradients")  # fmt: skip
    layer = nn.Linear(2, 2)
    optimizer = loop.make_optimizer(nn.Sequential(layer, layer), lr=0.1)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    check(len(held) == 2, "a layer that is used twice: its 2 parameters are held once",
          came_back=[tuple(p.shape) for p in held])  # fmt: skip
    for lr, wanted in ((0.1, 1.4), (0.3, 1.2)):  # the gradient's size cancels in a first step
        model = nn.Linear(1, 1, bias=False).to(device())
        nn.init.constant_(model.weight, 1.5)
        optimizer = loop.make_optimizer(model, lr=lr)
        model.weight.grad = torch.full_like(model.weight, 7.0)
        optimizer.step()
        assert_close(model.weight, torch.full_like(model.weight, wanted).detach(),
                     what=f"a weight of 1.5 after a step, lr={lr}, no weight decay")  # fmt: skip
    model = Regression()
    unused = model.unused.detach().clone()
    optimizer = loop.make_optimizer(
        model, lr=run()["lr"], weight_decay=run()["weight_decay"], betas=tuple(run()["betas"]),
        eps=run()["eps"],
    )  # fmt: skip
    for step, (groups, expected) in enumerate(zip(run()["steps"], run()["expected"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = expected["lr"]
        batches = [regression_rows(rows) for rows in groups]
        limit = run()["max_grad_norm"]
        loss = loop.train_step(model, regression_loss, optimizer, batches, max_grad_norm=limit)
        call = "train_step with make_optimizer, clipped, the golden run"
        assert_scalar(loss, expected["loss"], rtol=1e-5, call=call, what=f"loss of step {step + 1}")
        for name, wanted in expected["params"].items():
            assert_close(getattr(model, name).detach(), tensor(wanted), rtol=1e-5, atol=1e-6,
                         call=call, what=f"{name} after step {step + 1}")  # fmt: skip
    assert_close(model.unused.detach(), unused, what="a parameter that the loss does not reach")


@rung(
    hints=[
        "A resumed run must see the same order, whatever else drew random numbers meanwhile.",
        "A torch.Generator of your own, on the device, seeded from seed and epoch; randperm; cut "
        "off what does not fill a batch; split.",
    ]
)
def test_index_batches(monkeypatch):
    """Full batches of a permutation that seed and epoch alone decide, the rest dropped."""

    def batches(n, size, seed=3, epoch=0):
        return list(loop.index_batches(n, size, seed=seed, epoch=epoch, device=device()))

    for n, size, count, each in [
        (20, 6, 3, 6), (18, 6, 3, 6), (5, 8, 1, 5), (8, 8, 1, 8), (9, 8, 1, 8), (3, 1, 3, 1),
    ]:  # fmt: skip
        found = batches(n, size)
        call = f"index_batches({n}, {size}, seed=3, epoch=0)"
        shapes = [tuple(b.shape) for b in found]
        check(shapes == [(each,)] * count, f"{count} of shape ({each},)", came_back=shapes,
              call=call)  # fmt: skip
        good = all(b.dtype == torch.int64 and b.device.type == device().type for b in found)
        check(good, f"int64 tensors on {device()}", came_back=found[0], call=call)
        flat = torch.cat(found).tolist()
        check(len(set(flat)) == len(flat) and set(flat) <= set(range(n)),
              f"each index at most once, all in 0 .. {n - 1}", call=call,
              came_back=flat)  # fmt: skip

    torch.manual_seed(1)
    before = torch.get_rng_state()
    orders = {case: batches(100, 10, *case) for case in ((3, 0), (3, 1), (7, 0))}
    check(torch.equal(torch.get_rng_state(), before), "torch's global random state is not changed",
          call="index_batches(100, 10, ...)")  # fmt: skip
    torch.manual_seed(2)
    again, first = torch.cat(batches(100, 10)).tolist(), torch.cat(orders[3, 0]).tolist()
    check(again == first, "the same order for the same seed and epoch, whatever torch.manual_seed "
          f"was: {first[:6]} ...", came_back=again)  # fmt: skip
    plain = builtins.hash

    def salted(key):  # strings alone differ from process to process, and what holds them
        return plain(("another process", key) if "'" in repr(key) else key)

    monkeypatch.setattr(builtins, "hash", salted)
    again = torch.cat(batches(100, 10)).tolist()
    monkeypatch.undo()
    check(again == first, f"the same order in another process: {first[:6]} ...", came_back=again,
          what="with hash() as under another PYTHONHASHSEED")  # fmt: skip
    orders["unshuffled"] = torch.arange(100).split(10)
    told = {(3, 0): "seed 3, epoch 0", (3, 1): "seed 3, epoch 1", (7, 0): "seed 7, epoch 0",
            "unshuffled": "no shuffling at all"}  # fmt: skip
    for one, other in [(a, b) for a in orders for b in orders if str(a) < str(b)]:
        shared = max(len({*a.tolist()} & {*b.tolist()}) for a in orders[one] for b in orders[other])
        check(shared < 8, f"unrelated batches of 10 for {told[one]} and for {told[other]}",
              came_back=f"two batches with {shared} indices in common", call="index_batches(100, "
              "10, ...)")  # fmt: skip
    missed = set(range(8))
    for epoch in range(20):
        missed -= set(torch.cat(batches(8, 6, epoch=epoch)).tolist())
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
        during.append(torch.is_grad_enabled())
        return model(x).sum()

    def broken(model):
        raise KeyError("metric")

    for outer, inner in ((True, False), (False, True), (True, True), (False, False)):
        model.train(outer)
        model[2].train(inner)
        modes = [module.training for module in model.modules()]
        during.clear()
        value = loop.evaluate(model, metric)
        check(isinstance(value, float), "a float", came_back=value)
        assert_scalar(value, float(model[0](x).detach().sum()), rtol=1e-5)
        check(not any(during[:-1]), "every module in evaluation mode meanwhile",
              came_back=during[:-1])  # fmt: skip
        check(not during[-1], "gradients are off while the metric is taken")
        after = [module.training for module in model.modules()]
        check(after == modes, f"afterwards every module is as before: training = {modes}",
              came_back=after)  # fmt: skip
        for grad in (True, False):
            call = "evaluate(model, a metric_fn that raises KeyError)"
            with torch.set_grad_enabled(grad):
                expect_error(lambda: loop.evaluate(model, broken), KeyError, call=call)
                now = torch.is_grad_enabled()
            check(now is grad, f"gradients are {'on' if grad else 'off'} again, as before",
                  call=call)  # fmt: skip
            after = [module.training for module in model.modules()]
            check(after == modes, f"also after an error: training = {modes}", came_back=after,
                  call=call)  # fmt: skip


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

    def follow(stopping, script, first=1):
        """Give it metrics; in epoch e all of the model's numbers are e."""
        metrics = [metric for metric, _ in script]
        for epoch, (metric, stop) in enumerate(script, start=first):
            with torch.no_grad():
                for value in model.state_dict().values():
                    value.fill_(float(epoch))
            result = stopping.update(metric, epoch, model)
            check(result is stop or result == stop, f"{stop} after metrics "
                  f"{metrics[: epoch - first + 1]}", came_back=result,
                  call=f"EarlyStopping({stopping.patience}).update, epoch by epoch")  # fmt: skip

    model = Regression()
    stopping = loop.EarlyStopping(2)
    assert_scalar(stopping.best, -math.inf, call="EarlyStopping(2)", what="best before any update")
    assert_scalar(stopping.best_epoch, 0, call="EarlyStopping(2)", what="best_epoch before any")
    follow(loop.EarlyStopping(1), [(0.5, False), (0.5, True)])  # an equal metric is not better
    follow(loop.EarlyStopping(1), [(0.5, False), (math.nan, True)])  # and NaN never is
    script = [(0.3, False), (0.9, False), (0.5, False), (1.2, False), (1.2, False)]
    follow(stopping, [*script, (math.nan, True)])
    call = "EarlyStopping(2), metrics 0.3, 0.9, 0.5, 1.2, 1.2, NaN"
    assert_scalar(stopping.best, 1.2, call=call, what="best")
    assert_scalar(stopping.best_epoch, 4, call=call, what="best_epoch")
    for name, value in model.state_dict().items():
        kept = stopping.best_state.get(name)
        assert_close(kept, torch.full_like(value, 4.0), call=call, what=f"best_state['{name}']")
    follow(loop.EarlyStopping(0), [(metric, False) for metric in (0.5, 0.4, 0.3, 0.2)])
    follow(loop.EarlyStopping(2), [(math.nan, False), (math.nan, True)])
    follow(loop.EarlyStopping(1), [(-3.0, False), (-2.0, False), (-1.999999, False), (-2.5, True)])
    stopping = loop.EarlyStopping(3)
    follow(stopping, [(0.5, False), (0.4, False)])
    state = stopping.state_dict()
    follow(stopping, [(0.3, False), (0.9, False)], first=3)  # which must not change the state
    stopping = loop.EarlyStopping(3)
    stopping.load_state_dict(state)
    call = "EarlyStopping.load_state_dict(of one that saw 0.5, 0.4)"
    assert_scalar(stopping.best, 0.5, call=call, what="best")
    assert_scalar(stopping.best_epoch, 1, call=call, what="best_epoch")
    for name, value in model.state_dict().items():
        kept = stopping.best_state.get(name)
        assert_close(kept, torch.full_like(value, 1.0), call=call, what=f"best_state['{name}']")
    follow(stopping, [(0.3, False), (0.2, True)], first=3)


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


def loaded(path):
    """The state at `path`, or the error it gives in words."""
    try:
        return loop.load_checkpoint(path)
    except Exception as error:  # whatever a broken file gives
        return f"{type(error).__name__}: {error!s:.50}"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@rung(
    hints=[
        "torch.save and torch.load do the work; read about map_location and weights_only.",
        "A pickle may run anything when it is loaded: torch.load(..., weights_only=True).",
        "Whatever you write first under another name: remove it in `finally`.",
    ]
)
def test_checkpoint(tmp_path):
    """A checkpoint comes back as it was saved; code in a file is not executed."""
    folder = tmp_path / "new" / "folders"
    for number, path in enumerate((folder / "a.pt", str(folder / "b.pt"), folder / "a.pt"), 1):
        loop.save_checkpoint(path, nested(number))
        state = loop.load_checkpoint(path, device=device())
        assert_same_state(state, nested(number))
        weight = state["model"]["weight"]
        check(weight.device.type == device().type, f"tensors on {device()}", came_back=weight)
    state = loop.load_checkpoint(path, device="meta")
    place = state["model"]["weight"].device.type
    check(place == "meta", "tensors on the device that is asked for", came_back=place)
    check(names_in(folder) == ["a.pt", "b.pt"], "no other file than a.pt and b.pt is left behind",
          came_back=names_in(folder), call="save_checkpoint, three times")  # fmt: skip
    call = "save_checkpoint(path, {..., 'code': a lambda})"
    state = {**nested(4), "code": lambda: None}
    expect_error(lambda: loop.save_checkpoint(path, state), Exception, call=call)
    state = loaded(path)
    check(isinstance(state, dict), "the checkpoint before is still there, whole", came_back=state,
          call=f"{call}, then load_checkpoint")  # fmt: skip
    assert_same_state(state, nested(3))
    check(names_in(folder) == ["a.pt", "b.pt"], "what cannot be written leaves nothing behind",
          came_back=names_in(folder), call=call)  # fmt: skip
    marker = tmp_path / "executed"
    torch.save({"epoch": 1, "code": Code(marker)}, path)
    call = "load_checkpoint(a file that holds code)"
    expect_error(lambda: loop.load_checkpoint(path), Exception, call=call)
    check(not marker.exists(), "the code in the file was not executed", call=call)


def killed_at(size, action):
    """Run `action` in a child that is killed when a file is about to grow beyond `size` bytes.

    True if it was killed, False if it got through.
    """
    child = os.fork()
    if child == 0:
        try:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
            action()
        finally:
            os._exit(0)  # must never come back to pytest
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def seen_while(action, path):
    """What is at `path` before each C function that `action` calls, and after it.

    A kill at such a moment leaves what is on disk then.
    """
    seen = set()

    def look(*event):
        seen.add(path.read_bytes() if path.exists() else None)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        action()
    finally:
        sys.setprofile(before)
    return seen


def flushed_while(action, path, monkeypatch):
    """Whether the file that is at `path` after `action` was flushed to disk before it got there."""
    flushed = []

    def note(file):
        status = os.fstat(file) if isinstance(file, int) else os.fstat(file.fileno())
        published = path.exists() and os.path.samestat(os.stat(path), status)
        flushed.append((status.st_dev, status.st_ino, status.st_size, published))

    def note_all():
        for each in path.parent.iterdir():
            with open(each, "rb") as file:
                note(file)

    module = sys.modules[loop.save_checkpoint.__module__]
    for name, stand_in in (("fsync", note), ("fdatasync", note), ("sync", note_all)):
        real = getattr(os, name, None)
        for owner in (os, module):
            for known, value in list(vars(owner).items()):
                if real is not None and value is real:  # imported by name, perhaps
                    monkeypatch.setattr(owner, known, stand_in)
    action()
    monkeypatch.undo()
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_size, False) in flushed


def moved_while(action, path, monkeypatch):
    """What was moved to `path` while `action` ran, from where."""
    moved = []
    module = sys.modules[loop.save_checkpoint.__module__]
    for name in ("replace", "rename", "link"):
        real = getattr(os, name)

        def stand_in(source, target, *args, real=real, **options):
            if Path(target).resolve() == path.resolve():
                moved.append(Path(source).resolve())
            return real(source, target, *args, **options)

        for owner in (os, module):
            for known, value in list(vars(owner).items()):
                if value is real:  # imported by name, perhaps
                    monkeypatch.setattr(owner, known, stand_in)
    action()
    monkeypatch.undo()
    return moved


@rung(
    hints=[
        "The power goes while the file is half-written. What does the next run find at `path`?",
        "Never write into the file that people rely on: write another one beside it, completely, "
        "and put it in place in one step.",
        "Write to a temporary name in the same folder, flush, os.fsync, then os.replace.",
    ]
)
def test_killed_while_saving(tmp_path, monkeypatch):
    """Whenever the process is killed while saving, the old checkpoint or the new one is there."""
    path = tmp_path / "run.pt"
    old, new = nested(1), {**nested(2), "large": torch.arange(30_000.0)}

    def save():
        loop.save_checkpoint(path, new)

    loop.save_checkpoint(path, old)
    with open(path, "rb") as held:
        before = held.read()
        save()
        held.seek(0)
        check(held.read() == before, "the old file's bytes are never written over: whoever reads "
              "it meanwhile, or finds it after a crash, has it whole")  # fmt: skip
    assert_same_state(loop.load_checkpoint(path), new)
    loop.save_checkpoint(path, old)
    whole = [path.read_bytes(), *seen_while(save, path), path.read_bytes()]
    between = "no file" if None in whole else "a part of one"
    check({*whole} <= {whole[0], whole[-1]}, "at every moment a whole checkpoint at `path`, the "
          "old one or the new one", came_back=f"{between}, at a moment between",
          call="save_checkpoint over an older one")  # fmt: skip
    check(flushed_while(save, path, monkeypatch), "os.fsync of the whole new file before it gets "
          "its name: else a power cut may leave an empty one", call="save_checkpoint")  # fmt: skip
    foreign = [str(source) for source in moved_while(save, path, monkeypatch)
               if not source.is_relative_to(path.parent)]  # fmt: skip
    check(not foreign, "a temporary file in the same folder: from another one, perhaps of another "
          "file system, a move is a copy that may be cut off", call="save_checkpoint",
          came_back=foreign)  # fmt: skip
    if not hasattr(os, "fork"):
        return  # a kill in mid-save needs fork; what was checked so far holds everywhere
    for fresh in (True, False):
        if fresh:
            path.unlink()
        else:
            loop.save_checkpoint(path, old)
        check(killed_at(60_000, save), "a save of 120 kB writes that much", call="save_checkpoint")
        state = loaded(path) if path.exists() else "no file"
        found = state["model"]["weight"][0, 1].item() if isinstance(state, dict) else state
        check(found == ("no file" if fresh else 1.0),
              "no file" if fresh else "the old checkpoint, whole: a weight of 1.0",
              came_back=found, call="load_checkpoint, after a kill in the middle of "
              f"{'the first save' if fresh else 'save_checkpoint over an old one'}")  # fmt: skip
        save()  # whatever the killed one left behind is not in the way
        assert_same_state(loop.load_checkpoint(path), new)


# --- the loop -------------------------------------------------------------------------------------


@contextmanager
def rates_of_steps():
    """The learning rate of each step of any optimizer, as the step has used it."""
    rates = []

    def note(optimizer, *ignored):
        rates.append(float(optimizer.param_groups[0]["lr"]))

    hook = register_optimizer_step_post_hook(note)
    try:
        yield rates
    finally:
        hook.remove()


def config(**changes):
    options = {"epochs": 4, "batch_size": 2, "lr": 0.04, "accumulate": 3, "weight_decay": 0.2,
               "warmup": 0.35, "max_grad_norm": 15.0, "seed": 5}  # fmt: skip
    return loop.FitConfig(**{**options, **changes})


@rung(
    hints=[
        "Which rate does the very first step use? And is an epoch's loss a mean over rows or over "
        "steps?",
        "11 rows in batches of 2, three to a step: 5 batches, 2 steps an epoch, of 6 and 4 rows. "
        "8 steps in all, round(0.35 * 8) = 3 of them warm-up.",
        "Before each train_step set param_group['lr'] = lr * warmup_cosine(step); collect the "
        "detached losses; after the epoch one torch.stack(losses).tolist().",
    ]
)
def test_fit():
    """The whole run follows the schedule, groups the batches, and weighs losses by rows."""
    x = torch.randn(11, 3, generator=generator(1), dtype=torch.float64).to(device())
    y = torch.randn(11, 4, generator=generator(2), dtype=torch.float64).to(device())
    model, twin, asked, calls, ahead, inside = Regression(), Regression(), [], [], [], []

    def make_batch(index):
        asked.append(index)
        return {"x": x[index], "y": y[index]}

    def loss_fn(model, batch):
        inside.append((model.training, torch.is_autocast_enabled(device().type)))
        ahead.append(len(asked) - len(ahead))
        return regression_loss(model, batch)

    def on_epoch(epoch, loss, metric):
        calls.append((epoch, float(loss), metric))

    model.eval()
    with rates_of_steps() as rates:
        result = loop.fit(model, loss_fn, 11, make_batch, config(), on_epoch=on_epoch)
    check([len(index) for index in asked] == [2] * 20, "make_batch is called with 2 indices, 5 "
          "times in each of 4 epochs", came_back=[len(i) for i in asked])  # fmt: skip
    check(max(ahead) <= 3, "the batches of one step in memory, 3 at most, made when it needs them",
          came_back=f"{max(ahead)} batches at once")  # fmt: skip
    check(inside == [(True, False)] * 20, "the model is in training mode, autocast off",
          came_back=inside)  # fmt: skip
    params = [p for p in twin.parameters() if p.requires_grad]
    oracle = torch.optim.AdamW(
        [{"params": [p for p in params if p.dim() > 1], "weight_decay": 0.2},
         {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}], lr=1.0,
    )  # fmt: skip
    factors = [1 / 4, 2 / 4, 3 / 4] + [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
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
    for step, (rate, factor) in enumerate(zip(rates, factors, strict=False), start=1):
        assert_scalar(rate, 0.04 * factor, rtol=1e-6, what=f"the rate of step {step} of 8")
    for epoch, (mine, wanted) in enumerate(zip(result.losses, losses, strict=False), start=1):
        assert_scalar(mine, wanted, what=f"result.losses, epoch {epoch}: mean over its 10 rows")
    for name, value in model.named_parameters():
        wanted = dict(twin.named_parameters())[name].detach()
        assert_close(value.detach(), wanted, rtol=1e-6, what=f"{name} after 8 steps")
    what = "losses of 4 epochs, steps 8, examples 40, best_epoch 4, no metrics"
    good = (len(result.losses), result.steps, result.examples) == (4, 8, 40)
    good = good and result.best_epoch == 4 and result.metrics == []
    check(good, what, came_back=str(result))
    wanted = [(epoch, result.losses[epoch - 1], None) for epoch in (1, 2, 3, 4)]
    check(calls == wanted, "on_epoch(epoch from 1, loss, None) after each epoch", came_back=calls)
    orders = [torch.cat(asked[i : i + 5]).tolist() for i in (0, 5, 10, 15)]
    check(len({*map(tuple, orders)}) == 4, "another order in each epoch", came_back=orders)
    for seed in (5, 6):
        asked.clear(), ahead.clear(), inside.clear()
        model = Regression()
        changed = config(epochs=1, accumulate=5, seed=seed, autocast="bfloat16")
        before = model.bias.detach().clone()
        loop.fit(model, loss_fn, 11, make_batch, changed)
        assert_close((model.bias - before).abs().detach(), torch.full_like(before, 0.04), rtol=1e-4,
                     call="fit, one epoch of 5 batches in one step, lr 0.04", what="how far bias "
                     "went: the rate, for a first step of AdamW without warm-up")  # fmt: skip
        other = torch.cat(asked).tolist()
        check((other == orders[0]) == (seed == 5), "the same order for config.seed = 5 again, "
              "another one for 6", came_back=other, call=f"fit, seed {seed}")  # fmt: skip
        check(inside == [(True, True)] * 5, "config.autocast = 'bfloat16' reaches the loss",
              came_back=inside, call="fit, autocast='bfloat16'")  # fmt: skip
    asked.clear()
    model = Regression()
    before = model.bias.detach().clone()
    loop.fit(model, regression_loss, 3, make_batch, config(epochs=1, accumulate=1, batch_size=8))
    check([len(index) for index in asked] == [3], "one batch of all 3 rows, the only piece",
          came_back=[len(index) for index in asked], call="fit, 3 rows, batch_size=8")  # fmt: skip
    assert_close((model.bias - before).abs().detach(), torch.full_like(before, 0.04), rtol=1e-4,
                 call="fit, 3 rows, batch_size=8: a run of one step, lr 0.04",
                 what="how far bias went: the rate of that step")  # fmt: skip


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


def train(path, *, seed=1, crash=None, bad=None, script=(), on_epoch=None, pause=0.0, **changes):
    """A run of `fit` on 9 rows in 4 batches an epoch; the loss raises at its `crash`-th call.

    `script` are the validation metrics of epochs 1, 2, ... The loss is `bad` from the 7th call on.
    """
    x = torch.randn(9, 3, generator=generator(11)).to(device())
    y = torch.randn(9, 2, generator=generator(12)).to(device())
    model, count = Net(seed), [0]
    torch.manual_seed(seed)

    def loss_fn(model, batch):
        count[0] += 1
        if count[0] == crash:
            raise Killed
        check(model.training, "the loss is taken in training mode, in every epoch",
              came_back=f"evaluation mode in call {count[0]}", call="fit")  # fmt: skip
        if count[0] == 1:
            time.sleep(6 * pause)
        loss = ((model(batch["x"]) - batch["y"]) ** 2).mean()
        return loss * bad if bad is not None and count[0] >= 7 else loss

    def metric_fn(model):
        time.sleep(pause)
        model.dropout.train()(model.bias)  # a metric may draw random numbers, too
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
        "EarlyStopping.update says when to stop; after the loop load its best_state. A clock runs "
        "around the training part of an epoch only.",
        "Read the losses once an epoch; before anything is saved, raise FloatingPointError for "
        "the first that is not finite, naming epoch and step.",
    ]
)
def test_how_fit_ends(tmp_path):
    """Early when patience is over, with the best weights; and at once if a loss is not finite."""
    epochs = []

    def on_epoch(epoch, loss, metric):
        epochs.append((epoch, metric))

    script = (0.2, 0.7, 0.1, 0.6, 0.9)
    begin = time.perf_counter()
    model, result = train(None, script=script, patience=2, on_epoch=on_epoch, pause=0.01)
    elapsed = time.perf_counter() - begin
    call = f"fit, metrics of the epochs {script}, patience=2"
    check(epochs == [(1, 0.2), (2, 0.7), (3, 0.1), (4, 0.6)], "stopped after epoch 4", call=call,
          came_back=epochs)  # fmt: skip
    check((result.best_epoch, result.metrics, len(result.losses)) == (2, [0.2, 0.7, 0.1, 0.6], 4),
          "best_epoch 2, metrics and losses of 4 epochs", call=call,
          came_back=str(result))  # fmt: skip
    check(0.06 <= result.seconds <= elapsed - 0.04, "seconds is the wall time of training: the "
          "0.06 s that a loss slept are in it, the 0.04 s of validation are not", call=call,
          came_back=f"{result.seconds} of {elapsed:.3f} s")  # fmt: skip
    assert_scalar(model.calls, 8, call=call, what="training calls in the weights at the end: the "
                  "best epoch, 2, has 4 an epoch")  # fmt: skip
    kept = copy_of(model)
    model, _ = train(None, script=script[:2] + (0.0,) * 3)
    for name, value in copy_of(model).items():
        check(torch.equal(value, kept[name]), f"{name} as it was after epoch 2, to the bit",
              came_back=value, call="fit, best epoch 2 of 5")  # fmt: skip
    expect_error(
        lambda: loop.fit(model, regression_loss, 0, regression_rows, config()), ValueError,
        call="fit(num_examples=0)",
    )  # fmt: skip
    path = tmp_path / "run.pt"
    for bad in (math.nan, math.inf):
        path.unlink(missing_ok=True)
        call, said, epochs[:] = f"fit, 4 steps an epoch, {bad} from step 3 of epoch 2 on", "", []

        def broken(bad=bad):
            nonlocal said
            try:
                train(path, bad=bad, accumulate=1, on_epoch=on_epoch)
            except FloatingPointError as error:
                said = str(error)
                raise

        expect_error(broken, FloatingPointError, call=call)
        check({"2", "3"} <= {*re.findall(r"\d+", said)}, "a message that says epoch 2 and step 3",
              came_back=said, call=call)  # fmt: skip
        check(epochs == [(1, None)], "on_epoch for epoch 1 only", came_back=epochs, call=call)
        _, result = train(path, accumulate=1)  # from the checkpoint of epoch 1
        good = all(map(math.isfinite, result.losses))
        check(good, "the checkpoint of epoch 1 is kept, and a run can go on from it",
              came_back=result.losses, call=call)  # fmt: skip


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
def test_resume(tmp_path, monkeypatch):
    """A run that is killed anywhere and resumed equals the uninterrupted one to the bit."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes its time
    for script, patience, crashes in (
        ((), 0, (1, 6, 17)),
        ((0.2, 0.7, 0.1, 0.6, 0.9), 3, (9, 14)),
        ((0.8, 0.7, 0.6, 0.1), 3, (15,)),
    ):
        options = {"script": script, "patience": patience}
        expected = train(None, **options)
        for crash in crashes:
            path = tmp_path / f"{len(script)}-{crash}.pt"
            try:
                train(str(path), crash=crash, **options)
            except Killed:
                pass
            check(path.exists() == (crash > 4), "a checkpoint after each finished epoch",
                  came_back=path.exists(), call="fit(..., checkpoint=path)")  # fmt: skip
            seed = 1 if crash == 1 else 77  # nothing saved: it starts anew
            found = train(str(path), seed=seed, **options)
            call = f"fit, killed in epoch {(crash + 3) // 4}, resumed (metrics {script})"
            assert_same_run(found, expected, call)
        call = "fit, called again when the run was finished"
        try:
            found = train(path, seed=78, crash=1, **options)
        except Killed:
            check(False, "no training: the epochs are over, or patience is", call=call,
                  came_back="a call of loss_fn")  # fmt: skip
        assert_same_run(found, expected, call)
    for changes in ({"lr": 0.04}, {"epochs": 6}):
        expect_error(
            lambda changes=changes: train(path, **{**options, **changes}), ValueError,
            call=f"fit, resuming a checkpoint of lr=0.05, epochs=5 with {changes}",
        )  # fmt: skip
