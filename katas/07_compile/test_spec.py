"""What compiling, counting, timing and deciding must do (kata 07).

Nothing here depends on how fast the machine is: clocks and devices are fakes, and compilation is
looked at through functions that stand in for its backend.
"""

import copy
import math
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
    fail,
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
    `forward`, up to a limit.
    """

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = self.calls = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1

        def run(*arguments):
            self.calls += 1
            return graph.forward(*arguments)

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
    for name, bad in [
        ("a time below 0", (-1.0, 0.5, 1.0, 3)),
        ("calls below 0", (1.0, 0.5, 1.0, -3)),
        ("a time that is NaN", (1.0, math.nan, 1.0, 3)),
        ("an infinite time", (1.0, 0.5, math.inf, 3)),
    ]:
        expect_error(lambda bad=bad: compiled.pays_off(*bad), ValueError, call=f"pays_off, {name}")


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
    clock = Clock()
    functions = {
        "eager": planted(clock, [0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]),
        "compiled": planted(clock, [30.0, 4.0, 0.125, 0.125, 0.125, 0.125, 0.125]),
    }
    timings = compiled.benchmark(functions, warmup=2, rounds=5, clock=clock)
    assert_equal(list(timings), ["eager", "compiled"], what="the names, in the order given")
    for name, median, first in [("eager", 0.25, 0.5), ("compiled", 0.125, 30.0)]:
        assert_scalar(timings[name].median, median, what=f"median of {name!r}")
        assert_scalar(timings[name].first, first, what=f"first call of {name!r}")


@rung(
    hints=[
        "One slow round must not decide: that is why it is not the mean.",
        "statistics.quantiles(times, n=4, method='inclusive') gives low, median and high.",
    ]
)
def test_median_and_quartiles():
    """The median and both quartiles of the measured rounds, by linear interpolation."""
    table = golden("golden.json")["timing"]
    clock = Clock()
    function = planted(clock, [99.0, *table["times"]])
    timing = compiled.benchmark({"f": function}, warmup=1, rounds=9, clock=clock)["f"]
    for name in ("median", "low", "high"):
        assert_scalar(getattr(timing, name), table[name], what=f"{name} of {table['times']}")
    clock = Clock()
    function = planted(clock, [99.0, 1.0, 2.0, 3.0, 600.0])
    timing = compiled.benchmark({"f": function}, warmup=1, rounds=4, clock=clock)["f"]
    for name, value in [("low", 1.75), ("median", 2.5), ("high", 152.25)]:
        assert_scalar(getattr(timing, name), value, what=f"{name} of 1, 2, 3 and 600 seconds")


@rung(
    hints=[
        "A laptop gets hot: who is measured last looks slow.",
        "The outer loop is over rounds, the inner one over functions.",
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

    def queue(seconds):
        def run():
            clock.work(0.001)  # all that the caller does
            busy_until[0] = max(busy_until[0], clock.now) + seconds

        return run

    def synchronize():
        clock.now = max(clock.now, busy_until[0])

    queue(50.0)()  # somebody else's work
    functions = {"slow": queue(0.75), "fast": queue(0.25)}
    timings = compiled.benchmark(
        functions, warmup=1, rounds=5, synchronize=synchronize, clock=clock
    )
    for name, seconds in [("slow", 0.751), ("fast", 0.251)]:
        assert_scalar(timings[name].median, seconds, what=f"median of {name!r}")
        assert_scalar(timings[name].high, seconds, what=f"upper quartile of {name!r}")
        assert_scalar(timings[name].first, seconds, what=f"first call of {name!r}")


@rung(
    hints=[
        "What would a benchmark without warm-up measure first? Compilation.",
        "No functions, warmup below 1, rounds below 2: ValueError.",
    ]
)
def test_benchmark_refuses():
    """Nothing to call, no warm-up, and less than two rounds are ValueErrors."""
    one = {"f": lambda: None}
    bad = [
        ("no functions", lambda: compiled.benchmark({})),
        ("warmup=0", lambda: compiled.benchmark(one, warmup=0)),
        ("rounds=1", lambda: compiled.benchmark(one, rounds=1)),
    ]
    for name, function in bad:
        expect_error(function, ValueError, call=f"benchmark with {name}")


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
        ("three layers", network(), 0),
        ("a choice by arithmetic", Arithmetic(), 0),
        ("a branch on a value", Scaled(), 1),
        ("indexing by a mask", Masked(), 1),
        ("two prints", printing, 2),
    ]:
        report = compiled.count_graphs(function, [(x,)])
        for field, value in [("graph_breaks", breaks), ("graphs", breaks + 1), ("recompiles", 0)]:
            assert_equal(getattr(report, field), value, what=f"{field} of a model with {name}")


@rung(
    hints=[
        "What do later calls add to what the first one compiled?",
        "recompiles = graphs after all calls - graphs after the first.",
        "A number on the module is part of the program: when it changes, so does the program.",
    ]
)
def test_recompilation_is_seen():
    """Graphs that later calls add are recompilations: new sizes, one row, counters on a module."""
    equal = [(draw(5, 7, seed=seed),) for seed in range(4)]
    sizes = [(draw(rows, 7),) for rows in (4, 6, 9, 5)]
    for name, function, inputs, options, graphs in [
        ("four batches of one size", network(), equal, {}, 1),
        ("4, 6, 9 and 5 rows", network(), sizes, {}, 2),
        ("4, 6, 9, 5 and 1 rows", network(), [*sizes, (draw(1, 7),)], {}, 3),
        ("4, 6, 9 and 5 rows, dynamic=True", network(), sizes, {"dynamic": True}, 1),
        ("4, 6, 9 and 5 rows, dynamic=False", network(), sizes, {"dynamic": False}, 4),
        ("a counter in the module, four calls", Counting(), equal, {}, 4),
    ]:
        report = compiled.count_graphs(function, inputs, **options)
        assert_equal(report.graphs, graphs, what=f"graphs for {name}")
        assert_equal(report.recompiles, graphs - 1, what=f"recompiles for {name}")
        assert_equal(report.graph_breaks, 0, what=f"graph_breaks for {name}")


@rung(
    hints=[
        "Dynamo's caches and counters belong to the whole process.",
        "torch._dynamo.reset() and counters.clear(), before you count and after.",
        "A compiled model holds the original: compiled._orig_mod.",
    ]
)
def test_a_count_starts_clean():
    """What was compiled or counted before has no part in a count; compiled models count alike."""
    x, broken = draw(5, 7), Scaled()
    compiled.count_graphs(broken, [(x,)])
    torch.compile(broken, backend="eager")(x)
    model = network()
    torch.compile(model, backend="eager")(x)
    for name, function, breaks in [
        ("the same model again", broken, 1),
        ("a model that was compiled elsewhere", model, 0),
        ("a compiled model", torch.compile(model, backend="eager"), 0),
        ("a compiled model", torch.compile(broken, backend="eager", fullgraph=True), 1),
    ]:
        report = compiled.count_graphs(function, [(x,), (x,)])
        assert_equal(report.graph_breaks, breaks, what=f"graph_breaks of {name}")
        assert_equal(report.graphs, breaks + 1, what=f"graphs of {name}")
    check(len(compiled.count_graphs(broken, [(x,)]).reasons) == 1, "one reason for one break")
    expect_error(lambda: compiled.count_graphs(model, []), ValueError)


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
    x = torch.tensor(table["x"], device=device())
    cotangent = torch.tensor(table["cotangent"], device=device())
    for name in ("aot_eager", "counting"):
        backend, model = Backend(), network()
        fast = compiled.compile_model(model, backend=backend if name == "counting" else name)
        output = fast(x)
        assert_close(output, torch.tensor(table["output"]), dtype=torch.float32, rtol=1e-4,
                     atol=1e-5, what=f"output with backend {name}")  # fmt: skip
        (output * cotangent).sum().backward()
        for key, parameter in model.named_parameters():
            expected = torch.tensor(table["gradients"][key])
            assert_close(parameter.grad, expected, dtype=torch.float32, rtol=1e-4, atol=1e-5,
                         what=f"gradient of {key}, backend {name}")  # fmt: skip
    fast(x)
    check(backend.calls == 2, "2 calls of the compiled graph", came_back=backend.calls,
          what="how often compiled code ran in 2 calls of the model")  # fmt: skip


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
        call = f"compile_model(model with {name})(x)"
        expect_error(
            lambda model=model: compiled.compile_model(model, backend="eager")(x),
            RuntimeError,
            call=call,
        )
    fast = compiled.compile_model(Arithmetic(), backend="eager")
    for sign in (1, -1):
        y = sign * x.abs()
        assert_close(fast(y), Arithmetic()(y), what="a choice by arithmetic")


@rung(
    hints=[
        "The last batch of an epoch is smaller. Does that compile again, and the next one too?",
        "dynamic=None lets dynamo make a size symbolic when it sees a second one; hand the "
        "argument on.",
    ]
)
def test_few_graphs():
    """Batches of many sizes are served by at most three graphs; `dynamic` is handed on."""
    for dynamic, most in [(None, 3), (True, 2), (False, 6)]:
        backend = Backend()
        fast = compiled.compile_model(network(), backend=backend, dynamic=dynamic)
        for rows in (8, 5, 13, 1, 21, 2, 8):
            fast(draw(rows, 7))
        check(1 <= backend.graphs <= most, f"1 to {most} graphs", came_back=backend.graphs,
              what=f"graphs for 8, 5, 13, 1, 21 and 2 rows, dynamic={dynamic}")  # fmt: skip
    check(backend.graphs == 6, "6 graphs with dynamic=False", came_back=backend.graphs)


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
    torch._dynamo.reset()
    model, other = network(), nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))
    other.to(device())
    fast = compiled.compile_model(model, backend="eager")
    keys = ["0.weight", "0.bias", "2.weight", "2.bias"]
    for _ in range(2):  # before a call and after one
        saved = fast.state_dict()
        assert_equal(list(saved), keys, what="keys of the compiled model's state_dict()")
        assert_equal(list(model.state_dict()), keys, what="keys of the plain model's state_dict()")
        fast(draw(5, 7))
    fresh = copy.deepcopy(other)
    fresh.load_state_dict(saved)
    for key, value in model.state_dict().items():
        assert_close(fresh.state_dict()[key], value, what=f"{key}, saved compiled, loaded plain")
    fast.load_state_dict(other.state_dict())
    for key, value in other.state_dict().items():
        assert_close(model.state_dict()[key], value, what=f"{key}, saved plain, loaded compiled")


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
    fast = compiled.compile_model(model.eval(), backend=backend)
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


@rung(
    hints=[
        "Sizes 0 and 1 are compiled as special cases, and code for no_grad is other code than code "
        "for training.",
        "Run each input under torch.set_grad_enabled(grad); for training also compute gradients of "
        "the outputs' sum, but leave every .grad alone.",
        "torch.autograd.grad gives gradients without storing them; or put every .grad back.",
    ]
)
def test_warm_up():
    """After a warm-up of two sizes, serving or training compiles nothing more."""
    for grad in (False, True):
        model, backend = network(), Backend()
        fast = compiled.compile_model(model, backend=backend)
        kept = torch.full_like(model[0].bias, 0.5)
        model[0].bias.grad = kept.clone()
        with torch.set_grad_enabled(not grad):  # the caller's mode must not matter
            inputs = [(draw(4, 7),), (draw(6, 7),)]
            seconds = compiled.warm_up(fast, inputs, grad=grad)
        check(isinstance(seconds, float) and seconds > 0, "seconds above 0", came_back=seconds)
        check(backend.calls >= 2, "each input is run", came_back=backend.calls)
        assert_close(model[0].bias.grad, kept, what="a .grad that was there before")
        check(model[2].bias.grad is None, "no .grad is left", what="the .grad of a parameter")
        graphs = backend.graphs
        with torch.set_grad_enabled(grad):
            output = fast(draw(32, 7))
        if grad:
            output.sum().backward()
        check(backend.graphs == graphs, "none: the warm-up has paid for it",
              came_back=f"{backend.graphs - graphs} more graphs",
              what=f"graphs of a first call with grad={grad}")  # fmt: skip


@rung(
    hints=[
        "One row looks cheap, but broadcasting makes it a program of its own.",
        "Look at the first tensor of each input, also inside a dict: fewer than two rows is a "
        "ValueError, and so is no input at all.",
    ]
)
def test_warm_up_needs_two_rows():
    """A warm-up with one row, or with nothing, is a ValueError; batches may be dicts."""
    model = network()
    for name, inputs in [
        ("one row", [(draw(1, 7),)]),
        ("one row in a dict", [({"x": draw(1, 7)},)]),
        ("one row in the second input", [(draw(4, 7),), (draw(1, 7),)]),
        ("no inputs", []),
    ]:
        expect_error(
            lambda inputs=inputs: compiled.warm_up(model, inputs),
            ValueError,
            call=f"warm_up with {name}",
        )
    sizes, backward = [], []

    def function(batch):
        sizes.append(list(batch["x"].shape))
        output = model(batch["x"])
        if output.requires_grad:
            output.register_hook(backward.append)
        return {"output": output, "sizes": sizes}

    for grad in (False, True):
        compiled.warm_up(function, [({"x": draw(4, 7)},), ({"x": draw(6, 7)},)], grad=grad)
        assert_equal(sizes, [[4, 7], [6, 7]] * (1 + grad), what="batches seen by a function")
        check(len(backward) == 2 * grad, f"{2 * grad}", came_back=len(backward),
              what=f"backward passes of a warm-up with two inputs, grad={grad}")  # fmt: skip


@rung(
    hints=[
        "The default backend writes C++ and compiles it. What if nobody can?",
        "shutil.which finds a compiler; without one, warnings.warn and backend='eager'.",
    ]
)
def test_without_a_compiler(tmp_path, monkeypatch):
    """Without a C++ compiler the default backend is "eager", and a RuntimeWarning says so."""
    torch._dynamo.reset()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model, x = network(), draw(5, 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = compiled.compile_model(model)
    said = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
    if not any("compiler" in text for text in said):
        fail(came_back=f"warnings: {said}", expected="a RuntimeWarning about the missing compiler")
    assert_close(fast(x), model(x), what="output without a compiler")
