"""What compiling, counting, timing and deciding must do (kata 07).

Nothing here depends on how fast the machine is: clocks and devices are fakes, and compilation is
looked at through functions that stand in for its backend.
"""

import copy
import math
import os
import shutil
import sys
import time
import warnings

import torch
from torch import nn

from harness.spec import (
    assert_close,
    assert_equal,
    assert_scalar,
    check,
    device,
    expect_error,
    generator,
    golden,
    learner,
    rung,
)

compiled = learner("inference.compiled")


class Clock:
    """A clock that only moves when something says that it worked."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


class Backend:
    """Stands in for a compiler: counts the graphs that it is given, and the calls of them.

    Begins with a clean dynamo, which otherwise remembers every model of a test run with the same
    `forward`, up to a limit. What it "compiles" gives results that are too large by `error`.
    """

    def __init__(self, error=0.0):
        torch._dynamo.reset()
        self.error, self.options = error, {}
        self.graphs = self.calls = 0

    def __call__(self, graph, example_inputs, **options):
        self.graphs += 1
        self.options = options

        def run(*arguments):
            self.calls += 1
            return [x + self.error if self.error else x for x in graph.forward(*arguments)]

        return run


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed)).to(device())


def network(dropout=0.0):
    """7 inputs to 3 outputs, with the golden weights."""
    layers = [nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)]
    model = nn.Sequential(*layers, nn.Dropout(dropout)) if dropout else nn.Sequential(*layers)
    state = {key: torch.tensor(x) for key, x in golden("golden.json")["network"]["state"].items()}
    model.load_state_dict(state)
    return model.to(device())


def normalized(seed):
    """With buffers, too."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 11), nn.BatchNorm1d(11), nn.Linear(11, 3)).to(device())


class Scaled(nn.Module):
    """A branch on a value: cannot be one graph."""

    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x - 1


class Printing(nn.Module):
    """Says something in the middle: a graph cannot speak."""

    def forward(self, x):
        y = x * 2
        print("", end="")
        return y + 1


class Counting(nn.Module):
    """A counter on the module: another program at each call."""

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, x):
        self.step += 1
        return x * min(1.0, self.step / 100)


class Masked(nn.Module):
    """A size that depends on values."""

    def forward(self, x):
        kept = x[x[:, 0] > 0]
        return kept.mean(0)


class Arithmetic(nn.Module):
    """The same choice as Scaled, without a branch."""

    def forward(self, x):
        positive = (x.sum() > 0).to(x.dtype)
        return positive * (x * 2) + (1 - positive) * (x - 1)


class Scorer(nn.Module):
    """More than one tensor goes in and comes out."""

    def forward(self, batch, scale, *, bias=None):
        score = (batch["user"] * batch["item"]).sum(1) * scale
        return {"score": score if bias is None else score + bias, "parts": (batch["user"], scale)}


# --- when it pays ---------------------------------------------------------------------------------


@rung(
    hints=[
        "Two ways to spend time: all calls as they are, or compile once and make faster calls.",
        "compile + calls * compiled against calls * eager; an equal time is no gain.",
    ]
)
def test_when_it_pays():
    """Compiling pays if compile time plus fast calls take less than as many calls as it is."""
    for eager, fast, once, calls, expected in golden("golden.json")["pays_off"]:
        answer = compiled.pays_off(eager, fast, once, calls)
        assert_equal(answer, expected)
    names = ["eager_seconds", "compiled_seconds", "compile_seconds", "calls"]
    for i, name in enumerate(names):
        for bad in (-1.0, math.nan, math.inf):
            given = [2.0, 0.5, 1.0, 3.0]
            given[i] = bad
            expect_error(
                lambda given=given: compiled.pays_off(*given),
                ValueError,
                call=f"pays_off with {name}={bad}",
            )


# --- timing ---------------------------------------------------------------------------------------


def planted(clock, times):
    """A function that takes each of `times` in turn."""
    remaining = list(times)
    return lambda: clock.work(remaining.pop(0))


@rung(
    hints=[
        "The first calls compile and allocate: they say nothing about the later ones.",
        "Call each function `warmup` times before anything counts, but keep the time of its first "
        "call of all: that is `first`.",
    ]
)
def test_first_calls_do_not_count():
    """The warm-up, with its compilation, is not among the measured rounds; `first` is its cost."""
    for warmup in (3, 1):
        clock = Clock()
        functions = {
            "eager": planted(clock, [0.5, 0.75, 0.25][:warmup] + [0.25] * 5),
            "compiled": planted(clock, [30.0, 4.0, 4.0][:warmup] + [0.125] * 5),
        }
        timings = compiled.benchmark(functions, warmup=warmup, rounds=5, clock=clock)
        assert_equal(list(timings), ["eager", "compiled"], what="the names, in the order given")
        for name, median, first in [("eager", 0.25, 0.5), ("compiled", 0.125, 30.0)]:
            assert_scalar(timings[name].first, first, what=f"first call of {name!r}")
            for field in ("low", "median", "high"):
                assert_scalar(getattr(timings[name], field), median, what=f"{field} of {name!r}")


@rung(
    hints=[
        "One slow round must not decide: that is why it is not the mean.",
        "statistics.quantiles(times, n=4, method='inclusive') gives low, median and high.",
    ]
)
def test_median_and_quartiles():
    """The median and both quartiles of the measured rounds, by linear interpolation."""
    table = golden("golden.json")["timing"]
    quartiles = tuple(table[name] for name in ("low", "median", "high"))
    for times, expected in [
        (table["times"], quartiles),
        ([1.0, 2.0, 3.0, 600.0], (1.75, 2.5, 152.25)),
        ([7.0, 3.0], (4.0, 5.0, 6.0)),
    ]:
        clock = Clock()
        functions = {"f": planted(clock, [99.0, *times])}
        timings = compiled.benchmark(functions, warmup=1, rounds=len(times), clock=clock)
        for name, value in zip(("low", "median", "high"), expected, strict=True):
            got = getattr(timings["f"], name)
            assert_scalar(got, value, what=f"{name} of rounds that take {times} seconds")


@rung(
    hints=[
        "A laptop gets hot: who is measured last looks slow.",
        "The outer loop is over rounds, the inner one over functions.",
        "No functions, warmup below 1, rounds below 2: ValueError.",
    ]
)
def test_rounds_are_interleaved():
    """Each round calls every function once, so that a machine that slows down is fair to all."""
    clock, calls = Clock(), []

    def function(name, seconds):
        def run():
            calls.append(name)
            clock.work(seconds * (1 + len(calls) / 8))  # slower with every call of anything

        return run

    functions = {"a": function("a", 1.0), "b": function("b", 1.0), "c": function("c", 2.0)}
    timings = compiled.benchmark(functions, warmup=2, rounds=7, clock=clock)
    for name in functions:
        check(
            calls.count(name) == 9,
            "2 calls to warm up and 7 that count",
            came_back=calls.count(name),
            what=f"how often {name!r} was called",
        )
    for start in range(6, 27, 3):
        got = calls[start : start + 3]
        check(set(got) == {"a", "b", "c"}, "a, b and c once in each round", came_back=got)
    ratio = timings["b"].median / timings["a"].median
    check(0.8 < ratio < 1.25, "about 1: both do the same work", came_back=ratio,
          what="median of b over median of a")  # fmt: skip
    calls.clear()
    compiled.benchmark({"a": functions["a"]})
    assert_equal(len(calls), 12, what="calls of one function, by default 3 and 9")
    calls.clear()
    one = {"a": functions["a"]}
    for name, bad in [
        ("no functions", lambda: compiled.benchmark({})),
        ("warmup=0", lambda: compiled.benchmark(one, warmup=0)),
        ("rounds=1", lambda: compiled.benchmark(one, rounds=1)),
    ]:
        expect_error(bad, ValueError, call=f"benchmark with {name}")
        check(not calls, "refused before anything is called", came_back=f"{len(calls)} calls",
              call=f"benchmark with {name}")  # fmt: skip


@rung(
    hints=[
        "A GPU call returns before the work is done: without waiting one times the queueing.",
        "Wait before the clock is read the first time (old work is not yours) and before it is "
        "read the second time (your work is not done).",
        "wait(); start = clock(); function(); wait(); seconds = clock() - start",
    ]
)
def test_waits_for_the_device():
    """With `synchronize`, time is taken when the device is done, without what was queued before."""
    clock, busy_until = Clock(), [0.0]

    def queue(*seconds):
        remaining = list(seconds)

        def run():
            clock.work(0.001)  # all that the caller does
            taken = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            busy_until[0] = max(busy_until[0], clock.now) + taken

        return run

    def synchronize():
        clock.now = max(clock.now, busy_until[0])

    queue(50.0)()  # somebody else's work
    functions = {"slow": queue(8.0, 0.75), "fast": queue(0.25)}
    timings = compiled.benchmark(
        functions, warmup=1, rounds=5, synchronize=synchronize, clock=clock
    )
    for name, first, seconds in [("slow", 8.001, 0.751), ("fast", 0.251, 0.251)]:
        assert_scalar(timings[name].first, first, what=f"first call of {name!r}")
        assert_scalar(timings[name].median, seconds, what=f"median of {name!r}")
        assert_scalar(timings[name].low, seconds, what=f"lower quartile of {name!r}")
        assert_scalar(timings[name].high, seconds, what=f"upper quartile of {name!r}")


# --- counting -------------------------------------------------------------------------------------


@rung(
    hints=[
        "torch.compile takes a function as its backend: it is called once for each graph.",
        "Breaks stand in torch._dynamo.utils.counters, under 'graph_break' and 'unimplemented'.",
        "def backend(graph, example): count += 1; return graph.forward",
    ]
)
def test_one_graph_or_more():
    """A model without a break is one graph; each place where tracing stops is counted."""

    def printing(x):
        y = x * 2
        print("", end="")
        y = y + 1
        print("", end="")
        return y - 3

    x = draw(5, 7)
    for name, function, breaks in [
        ("a choice by arithmetic", Arithmetic(), 0),
        ("a branch on a value", Scaled(), 1),
        ("indexing by a mask", Masked(), 1),
        ("two prints", printing, 2),
    ]:
        report = compiled.count_graphs(function, [(x,)])
        for field, value in [("graph_breaks", breaks), ("graphs", breaks + 1), ("recompiles", 0)]:
            assert_equal(getattr(report, field), value, what=f"{field} of a model with {name}")
        reasons = report.reasons
        check(1 <= len(reasons) <= breaks or not breaks and not reasons,
              "a reason for a break, and only then", came_back=reasons,
              what=f"reasons of a model with {name}")  # fmt: skip
        lines = all(isinstance(why, str) and len(why.splitlines()) == 1 for why in reasons)
        check(lines, "reasons of one line each", came_back=reasons)
    expect_error(lambda: compiled.count_graphs(network(), []), ValueError)


@rung(
    hints=[
        "What do later calls add to what the first one compiled?",
        "recompiles = graphs after all calls - graphs after the first.",
        "A number on the module is part of the program: when it changes, so does the program.",
    ]
)
def test_recompilation_is_seen():
    """Graphs that later calls add are recompilations: new sizes, one row, counters on a module."""
    counts = [(draw(5, 7, seed=seed),) for seed in range(3)]
    sizes = [(draw(rows, 7),) for rows in (4, 6, 9)]
    rates = [(x, torch.tensor(0.1 * i, device=device())) for i, (x,) in enumerate(counts)]

    def times(x, rate=3):
        return x.relu() * rate

    for name, function, inputs, options, graphs, recompiles, breaks in [
        ("one size and three rates in tensors", times, rates, {}, 1, 0, 0),
        ("4, 6, 9 and 1 rows", times, [*sizes, (draw(1, 7),)], {}, 3, 2, 0),
        ("4 and 6 rows, dynamic=True", times, sizes[:2], {"dynamic": True}, 1, 0, 0),
        ("4, 6 and 9 rows, dynamic=False", times, sizes, {"dynamic": False}, 3, 2, 0),
        ("a counter in the module, three calls", Counting(), counts, {}, 3, 2, 0),
        ("a print, two sizes, dynamic=False", Printing(), sizes[1:], {"dynamic": False}, 4, 2, 2),
    ]:
        report = compiled.count_graphs(function, inputs, **options)
        assert_equal(report.graphs, graphs, what=f"graphs for {name}")
        assert_equal(report.recompiles, recompiles, what=f"recompiles for {name}")
        assert_equal(report.graph_breaks, breaks, what=f"graph_breaks for {name}")
    assert_equal(len(report.reasons), 1, what="reasons of a print that is compiled twice")
    with torch._dynamo.config.patch(recompile_limit=2):
        report = compiled.count_graphs(Counting(), counts)
    assert_equal(report.graphs, 2, what="graphs of three programs if dynamo may make two")
    assert_equal(report.graph_breaks, 0, what="graph_breaks when dynamo reaches its limit")


@rung(
    hints=[
        "Dynamo's caches and counters belong to the whole process.",
        "torch._dynamo.reset() and counters.clear(), before you count and after, `finally`.",
        "A compiled model holds the original: compiled._orig_mod.",
    ]
)
def test_a_count_starts_clean():
    """A count begins clean and leaves nothing behind; compiled functions count as the original."""
    x, broken = draw(5, 7), Scaled()
    sizes = [(draw(4, 7),), (draw(6, 7),)]

    def times(x):
        return x.relu() * 3

    compiled.count_graphs(broken, [(x,)])
    torch.compile(broken, backend="eager")(x)
    for each in sizes:  # from now on dynamo takes this size to be symbolic
        torch.compile(times, backend="eager")(*each)
    report = compiled.count_graphs(times, sizes)
    assert_equal(report.graphs, 2, what="graphs for 4 and 6 rows, which were compiled before")
    assert_equal(report.graph_breaks, 0, what="graph_breaks after a break of another function")
    for name, function, breaks in [
        ("the same model again", broken, 1),
        ("a compiled model", torch.compile(broken, backend="eager", fullgraph=True), 1),
        ("a compiled function", torch.compile(times, backend="eager"), 0),
    ]:
        report = compiled.count_graphs(function, [(x,), (x,)])
        assert_equal(report.graph_breaks, breaks, what=f"graph_breaks of {name}")
        assert_equal(report.graphs, breaks + 1, what=f"graphs of {name}")
        assert_equal(report.recompiles, 0, what=f"recompiles of {name}")
    from torch._dynamo.utils import counters

    def fails(x):
        print("", end="")
        raise LookupError("as planned")

    for name, finish in [
        ("", lambda: None),
        (" of a function that raises", lambda: compiled.count_graphs(fails, [(x,)])),
    ]:
        if name:
            expect_error(finish, LookupError, call=f"count_graphs{name}")
        left = {key: dict(each) for key, each in counters.items() if each}
        check(not left, f"no counts of dynamo's are left after a count{name}", came_back=left)
    backend = Backend()
    compiled.count_graphs(times, sizes)
    for each in sizes:
        torch.compile(times, backend=backend)(*each)
    check(backend.graphs == 2, "2: a count leaves no caches", came_back=backend.graphs,
          what="graphs for 4 and 6 rows after a count of the same function")  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    broken(x)
    check(not counters["frames"], "the function runs as it is after a count",
          came_back=f"dynamo looked at {dict(counters['frames'])}")  # fmt: skip
    modes, counting = [], Counting()

    def mode(x):
        modes.append(torch.is_grad_enabled())
        return counting(x)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compiled.count_graphs(mode, [(x,)])
    assert_equal(modes, [True, False], what="gradient mode in each call, enabled and not")
    assert_equal(counting.step, 2, what="calls of a function, two counts of one input")


# --- compiling ------------------------------------------------------------------------------------


@rung(
    hints=[
        "torch.compile returns a new callable; calling the old one runs the old code.",
        "torch.compile(model, backend=backend, ...), and return what that gives.",
    ]
)
def test_same_values_and_gradients():
    """The compiled model runs compiled code, and gives the values and gradients of the model."""
    table = golden("golden.json")["network"]
    x = torch.tensor(table["x"], device=device(), requires_grad=True)
    cotangent = torch.tensor(table["cotangent"], device=device())
    model, backend = network(), Backend()
    fast = compiled.compile_model(model, backend=backend)
    check(isinstance(fast, nn.Module), "a module", came_back=type(fast).__name__)
    check(backend.graphs == 0, "nothing compiles before a call", came_back=backend.graphs)
    output = fast(x)
    close = {"dtype": torch.float32, "rtol": 1e-4, "atol": 1e-5}
    assert_close(output, torch.tensor(table["output"]), **close, what="output")
    (output * cotangent).sum().backward()
    for key, parameter in model.named_parameters():
        expected = torch.tensor(table["gradients"][key])
        assert_close(parameter.grad, expected, **close, what=f"gradient of {key}")
    plain = torch.autograd.grad((model(x) * cotangent).sum(), x)[0]
    assert_close(x.grad, plain, **close, what="gradient of the input")
    fast(x)
    check(backend.calls == 2, "2 calls of the compiled graph", came_back=backend.calls,
          what="how often compiled code ran in 2 calls of the model")  # fmt: skip
    fast = compiled.compile_model(model, backend=Backend(error=1.0))
    assert_close(fast(x), model(x) + 1, what="output if the compiler makes it too large by 1")
    batch, scale = {"user": draw(5, 7), "item": draw(5, 7, seed=1)}, draw(5, seed=2)
    bias, fast = draw(5, seed=3), compiled.compile_model(Scorer(), backend=Backend())
    for given in ({}, {"bias": bias}):
        got, expected = fast(batch, scale, **given), Scorer()(batch, scale, **given)
        assert_equal(list(got), ["score", "parts"], what="keys of a model that returns a dict")
        assert_close(got["score"], expected["score"], what="score of a model with two arguments")
        assert_close(got["parts"][1], scale, what="a tensor inside a tuple inside the dict")


@rung(
    hints=[
        "By default a model that cannot be traced is cut in pieces, and you never hear of it.",
        "fullgraph=True turns a graph break into an error.",
    ]
)
def test_one_graph_or_an_error():
    """A model that cannot be one graph raises a RuntimeError when called; others do not."""
    torch._dynamo.reset()
    x = draw(5, 7)
    for name, model in [("a branch on a value", Scaled()), ("a print", Printing())]:
        fast = compiled.compile_model(model, backend=Backend())
        for time_ in ("first", "second"):
            expect_error(
                lambda fast=fast: fast(x),
                RuntimeError,
                call=f"compile_model(model with {name})(x), {time_} call",
            )
    fast = compiled.compile_model(Arithmetic(), backend=Backend())
    for sign in (1, -1):
        y = sign * x.abs()
        assert_close(fast(y), Arithmetic()(y), what="a choice by arithmetic")
    report = compiled.count_graphs(fast, [(x,)])
    assert_equal(report.graphs, 1, what="graphs of compile_model's result, for count_graphs")


@rung(
    hints=[
        "The last batch of an epoch is smaller. Does that compile again, and the next one too?",
        "dynamic=None lets dynamo make a size symbolic when it sees a second one; hand the "
        "arguments on.",
        "Who counts the calls of a model, or keeps a learning rate on it, makes a new program of "
        "each call.",
    ]
)
def test_few_graphs():
    """At most three graphs for batches of many sizes, and one for a training run of one size."""
    for dynamic, most in [(None, 3), (True, 2), (False, 4)]:
        backend = Backend()
        fast = compiled.compile_model(network(), backend=backend, dynamic=dynamic)
        for rows in (8, 5, 1, 13, 8):
            fast(draw(rows, 7))
        check(1 <= backend.graphs <= most, f"1 to {most} graphs", came_back=backend.graphs,
              what=f"graphs for 8, 5, 1 and 13 rows, dynamic={dynamic}")  # fmt: skip
    check(backend.graphs == 4, "4 graphs with dynamic=False", came_back=backend.graphs)
    backend, models = Backend(), [network(), network()]
    fast = compiled.compile_model(models[0], backend=backend, mode="reduce-overhead")
    for forward, model in zip([fast, models[1]], models, strict=True):
        momentum = [torch.zeros_like(p) for p in model.parameters()]
        for step in range(10):
            loss = forward(draw(5, 7, seed=step)).square().mean()
            for p, m, g in zip(
                model.parameters(),
                momentum,
                torch.autograd.grad(loss, list(model.parameters())),
                strict=True,
            ):
                m.mul_(0.9).add_(g)
                p.data.sub_(0.1 / (1 + step) * m)  # another rate at each step
    check(backend.graphs == 1, "1 graph for training", came_back=backend.graphs,
          what="graphs of 10 steps with 5 rows, another learning rate each")  # fmt: skip
    for key, value in models[1].state_dict().items():
        assert_close(models[0].state_dict()[key], value, rtol=1e-4, atol=1e-5,
                     what=f"{key} after 10 training steps")  # fmt: skip
    assert_equal(backend.options, {"mode": "reduce-overhead"}, what="what the backend is told")


@rung(
    hints=[
        "Print list(compiled.state_dict()). What would a plain model say to these keys?",
        "The wrapper keeps the model as its child `_orig_mod`. The keys of the result must not "
        "show it, and loading must not ask for it.",
        "register_state_dict_post_hook can rename the keys, register_load_state_dict_pre_hook "
        "renames them back.",
    ]
)
def test_checkpoints_are_interchangeable():
    """The state dict has the plain model's keys, and each loads what the other saved."""
    model, other, third = normalized(1), normalized(2), normalized(3)
    fast = compiled.compile_model(model, backend=Backend())
    keys = sorted(other.state_dict())
    for _ in range(2):  # before a call and after one
        saved = fast.state_dict()
        assert_equal(sorted(saved), keys, what="keys of the compiled model's state_dict()")
        assert_equal(sorted(model.state_dict()), keys, what="keys of the plain model's")
        fast(draw(5, 7))
    third.load_state_dict(saved)
    for key, value in model.state_dict().items():
        assert_close(third.state_dict()[key], value, what=f"{key}, saved compiled, loaded plain")
    given = dict(other.state_dict())
    for name, state in [("plain", given), ("compiled", None)]:
        if state is None:
            state = compiled.compile_model(normalized(4), backend=Backend()).state_dict()
        wanted = {key: value.clone() for key, value in state.items()}
        fast.load_state_dict(state)
        for key, value in wanted.items():
            assert_close(model.state_dict()[key], value, what=f"{key}, saved {name}")
    assert_equal(sorted(given), keys, what="keys of the dict that was loaded")
    del given["2.bias"]
    for name, state in [
        ("a key is missing", given),
        ("a key is not expected", wanted | {"3.bias": wanted["2.bias"]}),
    ]:
        expect_error(
            lambda state=state: fast.load_state_dict(state),
            RuntimeError,
            call=f"load_state_dict of the compiled model, {name}",
        )


@rung(
    hints=[
        "Is the model that was handed in still what it was?",
        "The result shares the model's parameters and modules: do not copy it, do not compile it "
        "in place.",
    ]
)
def test_the_model_stays():
    """The plain model still runs as it is, and both are the same parameters and the same mode."""
    model, backend, x = network(dropout=0.5), Backend(), draw(5, 7)
    modes = {name: each.training for name, each in model.named_modules()}
    fast = compiled.compile_model(model, backend=backend)
    now = {name: each.training for name, each in model.named_modules()}
    assert_equal(now, modes, what="training, of the model's modules")
    check(all(p.requires_grad for p in model.parameters()), "parameters still train")
    model.eval()
    fast(x)
    before = backend.calls
    model(x)
    check(backend.calls == before, "the plain model runs without compiled code",
          came_back=f"{backend.calls - before} calls of a compiled graph")  # fmt: skip
    assert_close(fast(x), model(x), what="both in eval mode")
    with torch.no_grad():
        model[2].bias.add_(1.5)
    assert_close(fast(x), model(x), what="after an update of the plain model")
    mine, theirs = list(fast.parameters()), list(model.parameters())
    check(len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True)),
          "the parameters of the result are those of the model")  # fmt: skip
    model.train()
    x = draw(400, 7)
    zeros = (fast(x) == 0).float().mean()
    check(0.4 < zeros < 0.6, "dropout of 0.5 after model.train()", came_back=zeros,
          what="share of zeros from the compiled model")  # fmt: skip
    fast.eval()
    check(not model.training and not model[3].training, "fast.eval() acts on the model too")
    assert_close(fast(x), model(x), what="both after fast.eval()")
    if device().type != "mps":  # has no float64
        fast.double()
        assert_close(fast(x.double()), model(x.double()), dtype=torch.float64,
                     what="both after fast.double()")  # fmt: skip
    model, plain = normalized(5), copy.deepcopy(normalized(5))
    compiled.compile_model(model, backend=Backend())(x)
    plain(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(model[1], key), getattr(plain[1], key),
                     what=f"{key} of the model after a call of the result")  # fmt: skip


class Spy(torch.autograd.Function):
    """The identity; notes the gradient that arrives."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(gradient.detach().clone())
        return gradient, None


@rung(
    hints=[
        "Sizes 0 and 1 are compiled as special cases, and code for no_grad is other code than code "
        "for training.",
        "Run each input under torch.set_grad_enabled(grad); for training also compute gradients of "
        "the outputs' sum, but leave every .grad alone.",
        "torch.autograd.grad gives gradients without storing them; or put every .grad back. Look "
        "at the first tensor of each input, also inside a dict: fewer than two rows is a "
        "ValueError, and so is no input at all.",
    ]
)
def test_warm_up():
    """After a warm-up with two sizes of two rows or more, serving or training compiles no more."""
    model, called = network(), []
    for name, inputs in [
        ("one row", [(draw(1, 7),)]),
        ("one row in a dict", [({"x": draw(1, 7)},)]),
        ("one row in a list, two after it", [([draw(1, 7)], draw(2, 7))]),
        ("one row in the second input", [(draw(4, 7),), (draw(1, 7),)]),
        ("no row", [(draw(0, 7),)]),
        ("no inputs", []),
    ]:
        expect_error(
            lambda inputs=inputs: compiled.warm_up(lambda *x: called.append(x), inputs),
            ValueError,
            call=f"warm_up with {name}",
        )
    check(not called, "all inputs are looked at before anything is called",
          came_back=f"{len(called)} calls", call="warm_up with bad inputs")  # fmt: skip
    compiled.warm_up(lambda x, one: x, [(draw(2, 7), draw(1, 7))])  # the first has two rows
    for grad in (False, True):
        backend = Backend()
        fast = compiled.compile_model(model, backend=backend)
        kept = torch.full_like(model[0].bias, 0.5)
        model[0].bias.grad = kept.clone()
        with torch.set_grad_enabled(not grad):  # the caller's mode must not matter
            compiled.warm_up(fast, [(draw(4, 7),), (draw(6, 7),)], grad=grad)
            check(torch.is_grad_enabled() == (not grad), "the caller's gradient mode stays",
                  came_back=f"enabled: {torch.is_grad_enabled()}")  # fmt: skip
        check(backend.calls >= 2, "each input is run", came_back=backend.calls)
        assert_close(model[0].bias.grad, kept, what="a .grad that was there before")
        check(model[2].bias.grad is None, "no .grad is left", what="the .grad of a parameter")
        graphs = backend.graphs
        with torch.set_grad_enabled(grad):
            output = fast(draw(32, 7))
        if grad:
            output.sum().backward()
        model.zero_grad()
        check(backend.graphs == graphs, "none: the warm-up has paid for it",
              came_back=f"{backend.graphs - graphs} more graphs",
              what=f"graphs of a first call with grad={grad}")  # fmt: skip
    sizes, gradients, modes = [], [], []
    x, y = (draw(rows, 7).requires_grad_() for rows in (4, 6))

    def function(batch, pause):
        sizes.append(len(batch["x"]))
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        weight = model[0].weight
        if torch.is_grad_enabled():
            weight = Spy.apply(weight, gradients)
        time.sleep(pause)
        out = batch["x"] @ weight.T
        for _ in range(40):  # as many paths back as there are numbers of 40 bits
            out = (out + out) / 2
        return {"two": [2 * out, weight.detach()], "three": 3 * out, "pause": pause}

    for grad in (False, True):
        for each in (sizes, modes):
            each.clear()
        begin = time.perf_counter()
        inputs = [({"x": x}, 0.06 * (1 - grad)), ({"x": y}, 0.06 * grad)]
        seconds = compiled.warm_up(function, inputs, grad=grad)
        passed = time.perf_counter() - begin
        assert_equal(sorted(set(sizes)), [4, 6], what="rows seen by a function")
        check(set(modes) == {(grad, False)}, f"gradients {'on' if grad else 'off'}",
              came_back=modes, what="gradient mode and inference mode in the calls")  # fmt: skip
        check(isinstance(seconds, float) and 0.05 < seconds <= passed,
              f"the seconds of it all: one of the inputs takes 0.06, and all {passed:.4f}",
              came_back=seconds)  # fmt: skip
        check(bool(gradients) == grad, "a backward pass if grad=True, and only then",
              came_back=f"{len(gradients)} backward passes with grad={grad}")  # fmt: skip
    expected = [5 * each.detach().sum(0).expand(11, 7) for each in (x, y)]
    for wanted in expected:
        nearest = min(gradients, key=lambda got: (got - wanted).abs().max())
        assert_close(nearest, wanted, what="gradient of a weight from the sum of the outputs")
    check(x.grad is None and model[0].weight.grad is None, "no .grad is left",
          came_back=[x.grad, model[0].weight.grad],
          what="the .grad of an input, and of a weight that a function uses")  # fmt: skip


def afresh():
    """Forget what the learner's module and torch remember of the compiler."""
    sys.modules.pop("recsys.inference.compiled", None)
    builder = sys.modules.get("torch._inductor.cpp_builder")
    for name in ("get_cpp_compiler", "cpp_compiler_search"):
        getattr(getattr(builder, name, None), "cache_clear", lambda: None)()


@rung(
    hints=[
        "The default backend writes C++ and compiles it. What if nobody can?",
        "shutil.which finds a compiler. A program that is found may still fail: let it check a "
        "line of C++. If that fails: warnings.warn, and backend='eager'.",
    ]
)
def test_without_a_compiler(tmp_path, monkeypatch):
    """Without a C++ compiler that works, the default is "eager", and a RuntimeWarning says so."""
    path, x, model = os.environ.get("PATH", ""), draw(5, 7), network()
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("g++", "clang++", "c++"):
        (tmp_path / "broken" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "broken" / name).chmod(0o755)
    cases = ["empty", "broken"] if os.name == "posix" else ["empty"]

    def said(**given):
        afresh()
        torch._dynamo.reset()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast = compiled.compile_model(model, **given)
            if given.get("backend") or os.environ["PATH"] != path:
                assert_close(fast(x), model(x), what="output")
        found = [each for each in caught if issubclass(each.category, RuntimeWarning)]
        return [str(each.message) for each in found if "compiler" in str(each.message).lower()]

    for case in cases:
        monkeypatch.setenv("PATH", str(tmp_path / case))
        for mode in (None, "reduce-overhead"):
            told = said(mode=mode)
            check(told, "a RuntimeWarning about the missing compiler", came_back=told,
                  call=f"compile_model(model, mode={mode!r}), {case} folder of compilers",
                  what="warnings")  # fmt: skip
        told = said(backend=Backend())
        check(not told, "no warning: another backend was chosen", came_back=told)
    monkeypatch.setenv("PATH", path)
    asked = []
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: asked.append(k) or real(*a, **k))
    if shutil.which("g++") and sys.platform == "linux":
        mode = "max-autotune-no-cudagraphs"
        told = said(mode=mode)
        check(not told, "no warning where g++ works", came_back=told)
        for given in asked:  # whoever compiles in another way is not asked
            got = given.get("backend", "inductor")
            assert_equal(got, "inductor", what="backend of torch.compile, where g++ works")
            assert_equal(given.get("mode"), mode, what="mode of torch.compile")
    afresh()
