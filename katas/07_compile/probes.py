"""What the diagnosis asks of kata 07: see harness/probe.py."""

import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from harness.probe import probe
from harness.spec import learner

compiled = learner("inference.compiled")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Backend:
    """Counts graphs and calls, and makes results too large by `error`."""

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


class Printing(nn.Module):
    def forward(self, x):
        y = x * 2
        print("", end="")
        return y + 1


class Counting(nn.Module):
    step = 0

    def forward(self, x):
        self.step += 1
        return x * min(1.0, self.step / 100)


def triple(x):
    return x.relu() * 3


def numbers(*shape):
    """The same on every machine."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64) * 0.7).sin().reshape(shape)


def linear(**layers):
    model = nn.Sequential(nn.Linear(3, 2), *layers.values()).double()
    with torch.no_grad():
        model[0].weight.copy_(numbers(2, 3))
        model[0].bias.copy_(numbers(2))
    return model


def code(function, error):
    """0: accepted, 1: refused as it should be, 2: with another exception."""
    try:
        function()
    except error:
        return 1
    except Exception:
        return 2
    return 0


# --- deciding and timing --------------------------------------------------------------------------


@probe
def decisions():
    """Around the number of calls from which on it pays."""
    cases = [(4, 3, 8, calls) for calls in (0, 1, 7, 8, 9, 11)]
    cases += [(3, 4, 0, 9), (3, 3, 0, 9), (4, 3, 0, 1), (4, 3, 5, 4), (9, 1, 8, 1)]
    return [int(compiled.pays_off(*map(float, case))) for case in cases]


@probe
def impossible_times():
    cases = []
    for i in range(4):
        for bad in (-1.0, float("nan"), float("inf")):
            case = [2.0, 0.5, 1.0, 3.0]
            case[i] = bad
            cases.append(case)
    return [code(lambda case=case: compiled.pays_off(*case), ValueError) for case in cases]


def planted(clock, times):
    remaining = iter(times)

    def run():
        clock.now += next(remaining)

    return run


@probe
def timed():
    """Two functions with planted times."""
    clock = Clock()
    functions = {
        "b": planted(clock, [20.0, 5.0, 1.0, 2.0, 4.0, 9.0, 3.5]),
        "a": planted(clock, [7.0, 6.0, 0.5, 0.25, 2.5, 0.125, 1.5]),
    }
    timings = compiled.benchmark(functions, warmup=2, rounds=5, clock=clock)
    fields = ("first", "low", "median", "high")
    return [[name, *(float(getattr(t, f)) for f in fields)] for name, t in timings.items()]


@probe
def timed_on_a_device():
    """Calls that return before the device has done the work, with work of others before."""
    clock, busy = Clock(), [130.0]

    def queued(times):
        remaining = iter(times)

        def run():
            clock.now += 0.125
            busy[0] = max(busy[0], clock.now) + next(remaining)

        return run

    def wait():
        clock.now = max(clock.now, busy[0])

    functions = {"a": queued([16.0, 1.0, 2.0, 4.0]), "b": queued([3.0, 5.0, 9.0, 6.0])}
    timings = compiled.benchmark(functions, warmup=1, rounds=3, synchronize=wait, clock=clock)
    fields = ("first", "low", "median", "high")
    return [[float(getattr(t, f)) for f in fields] for t in timings.values()]


@probe
def rounds():
    """How often each was called before the rounds and in each; the calls by default."""
    calls = []
    names = ["a", "b", "c"]
    functions = {name: lambda name=name: calls.append(name) for name in names}
    compiled.benchmark(functions, warmup=2, rounds=3)
    parts = [calls[:6], *(calls[i : i + 3] for i in range(6, len(calls), 3))]
    told = [[part.count(name) for name in names] for part in parts]
    calls.clear()
    compiled.benchmark({"a": functions["a"]})
    return {"parts": told, "default": len(calls)}


@probe
def benchmark_refuses():
    one = {"f": lambda: None}
    cases = [({}, 1, 2), (one, 0, 2), (one, -1, 2), (one, 1, 1), (one, 1, 0), (one, 1, 2)]
    return [
        code(lambda f=f, w=w, r=r: compiled.benchmark(f, warmup=w, rounds=r), ValueError)
        for f, w, r in cases
    ]


# --- counting -------------------------------------------------------------------------------------


def told(report):
    return [report.graphs, report.graph_breaks, report.recompiles]


@probe
def counted():
    """Graphs, breaks, recompiles."""
    sizes = [(numbers(rows, 3),) for rows in (4, 6, 9)]
    counting = Counting()
    found = {
        "static": told(compiled.count_graphs(triple, [*sizes, sizes[0]], dynamic=False)),
        "printing": told(compiled.count_graphs(Printing(), sizes[:2], dynamic=False)),
        "branching": told(compiled.count_graphs(lambda x: x * 2 if x.sum() > 0 else x, sizes[:1])),
    }
    logging.disable(logging.WARNING)  # dynamo says at length that it gives up
    try:
        with torch._dynamo.config.patch(recompile_limit=2):
            found["limit"] = told(compiled.count_graphs(counting, sizes[:1] * 3))
    finally:
        logging.disable(logging.NOTSET)
    none = code(lambda: compiled.count_graphs(triple, []), ValueError)
    return found | {"calls": counting.step, "none": none}


@probe
def counted_with_a_history():
    """After other breaks and compilations; of a function that is compiled already."""
    x, printing = numbers(4, 3), Printing()
    plain = Backend()
    torch.compile(printing, backend=plain)(x)
    whole = torch.compile(printing, backend=plain, fullgraph=True)
    sizes = [(x,), (numbers(6, 3),)]
    for each in sizes:
        torch.compile(triple, backend=plain)(*each)
    modes = []

    def mode(x):
        modes.append(int(torch.is_grad_enabled()))
        return x * 2

    return {
        "sizes": told(compiled.count_graphs(triple, sizes)),
        "whole": told(compiled.count_graphs(whole, [(x,)])),
        "mode": [*told(compiled.count_graphs(mode, [(x,)])), *modes],
    }


@probe
def left_behind():
    """Graphs of other code after a count; what dynamo remembers; does the module stay plain?"""
    from torch._dynamo.utils import counters

    def fails(x):
        print("", end="")
        raise LookupError

    def remembered():
        return int(any(each for each in counters.values()))

    backend, module = Backend(), nn.Softplus()
    sizes = [(numbers(4, 3),), (numbers(6, 3),)]
    raised = code(lambda: compiled.count_graphs(fails, sizes), LookupError)
    left = [raised, remembered()]
    torch._dynamo.reset()
    counters.clear()
    compiled.count_graphs(module, sizes)
    left.append(remembered())
    for each in sizes:
        torch.compile(module, backend=backend)(*each)
    torch._dynamo.reset()
    counters.clear()
    module(*sizes[0])
    return [backend.graphs, *left, int(bool(counters["frames"]))]


# --- compiling ------------------------------------------------------------------------------------


@probe
def values():
    """Output and gradients, also if the compiler errs by 0.5."""
    x = numbers(4, 3).requires_grad_()
    backend, model = Backend(error=0.5), linear()
    fast = compiled.compile_model(model, backend=backend, mode="reduce-overhead")
    out = fast(x)
    (out * numbers(4, 2)).sum().backward()
    fast(x)
    return {
        "output": out,
        "gradients": [x.grad, model[0].weight.grad],
        "calls": [backend.graphs, backend.calls],
        "options": sorted(backend.options.items()),
    }


class Scorer(nn.Module):
    def forward(self, batch, *, scale):
        return {"score": batch["x"].sum(1) * scale}


@probe
def dicts_and_keywords():
    fast = compiled.compile_model(Scorer(), backend=Backend())
    return fast({"x": numbers(4, 3)}, scale=numbers(4))


@probe
def not_one_graph():
    """A print in a model is an error; so is the third program of a counter."""
    torch._dynamo.reset()
    fast = compiled.compile_model(Printing(), backend=Backend())
    return [code(lambda: fast(numbers(4, 3)), RuntimeError) for _ in range(2)]


@probe
def graphs_of_sizes():
    found = []
    for dynamic in (None, True):
        backend = Backend()
        fast = compiled.compile_model(linear(), backend=backend, dynamic=dynamic)
        found.append([])
        for rows in (4, 4, 6, 9):
            fast(numbers(rows, 3))
            found[-1].append(backend.graphs)
    return found


@probe
def checkpoints():
    """Keys that are saved, and what is loaded from where; 2 for an error."""
    model = linear(norm=nn.BatchNorm1d(2))
    fast = compiled.compile_model(model, backend=Backend())
    plain = linear(norm=nn.BatchNorm1d(2))
    with torch.no_grad():
        plain[0].bias.copy_(torch.tensor([5.0, 7.0]))
    state = plain.state_dict()
    short = {key: value for key, value in state.items() if key != "0.bias"}
    found = {
        "keys": sorted(fast.state_dict()),
        "plain keys": sorted(model.state_dict()),
        "loads": [
            code(lambda: fast.load_state_dict(fast.state_dict()), KeyError),
            code(lambda: fast.load_state_dict(short), RuntimeError),
            code(lambda: fast.load_state_dict(state | {"bias": 1}), RuntimeError),
            code(lambda: fast.load_state_dict(state), KeyError),
        ],
    }
    return found | {"bias": model[0].bias}


@probe
def shared():
    """What reaches the plain model, and what the plain model reaches."""
    model, backend, x = linear(drop=nn.Dropout(0.0)), Backend(), numbers(4, 3)
    fast = compiled.compile_model(model, backend=backend)
    found = [int(model.training), int(all(p.requires_grad for p in model.parameters()))]
    fast(x)
    before = backend.calls
    model(x)
    found += [backend.calls - before, len(list(fast.parameters()))]
    with torch.no_grad():
        model[0].bias.add_(1.5)
    out = fast(x)
    fast.eval()
    found += [int(model.training), int(model[1].training)]
    fast.float()
    return {"facts": found, "output": out, "type": str(model[0].weight.dtype)}


class Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(gradient.detach().clone())
        return gradient, None


@probe
def warmed_up():
    """Modes, rows and gradients of a function that is warmed up, and each .grad afterwards."""
    found = {}
    for grad in (False, True):
        weight, other = (numbers(2, 3).requires_grad_() for _ in range(2))
        weight.grad = numbers(2, 3) + 2
        x, y = (numbers(rows, 3).requires_grad_() for rows in (4, 6))
        rows, modes, gradients = [], [], []

        def function(
            batch, count, rows=rows, modes=modes, gradients=gradients, weight=weight, other=other
        ):
            rows.append(len(batch["x"]))
            modes.append(int(torch.is_grad_enabled()) + 2 * int(torch.is_inference_mode_enabled()))
            used = Spy.apply(weight, gradients) if torch.is_grad_enabled() else weight
            out = batch["x"] @ used.T
            return {"out": [2 * out, batch["x"] @ other.T], "more": 3 * out, "count": count}

        with torch.set_grad_enabled(not grad):
            compiled.warm_up(function, [({"x": x}, 3), ({"x": y}, 3)], grad=grad)
            modes.append(int(torch.is_grad_enabled()))
        once = {str(each.tolist()): each for each in gradients}  # an input may be run again
        found[f"grad={grad}"] = {
            "rows": sorted(set(rows)),
            "modes": [sorted(set(modes[:-1])), modes[-1]],
            "gradients": sum(once.values()),
            "kept": -1.0 if weight.grad is None else weight.grad,
            "left": [int(each.grad is not None) for each in (other, x, y)],
        }
    return found


@probe
def warm_up_refuses():
    cases = [
        [(numbers(1, 3),)],
        [({"x": numbers(1, 3)},)],
        [([numbers(1, 3)], numbers(2, 3))],
        [(numbers(2, 3),), (numbers(1, 3),)],
        [(numbers(0, 3),)],
        [],
        [(numbers(2, 3), numbers(1, 3))],
    ]
    return [
        code(lambda case=case: compiled.warm_up(lambda *x: None, case), ValueError)
        for case in cases
    ]


@probe
def graphs_after_a_warm_up():
    found = []
    for grad in (False, True):
        backend = Backend()
        fast = compiled.compile_model(linear(), backend=backend)
        with torch.set_grad_enabled(not grad):
            compiled.warm_up(fast, [(numbers(4, 3),), (numbers(6, 3),)], grad=grad)
        found.append(backend.graphs)
        with torch.set_grad_enabled(grad):
            fast(numbers(9, 3))
        found.append(backend.graphs)
    return found


@probe
def seconds_of_a_warm_up():
    """Whether the first of two inputs is in it, and the second; whether these are seconds."""
    found = []
    for pauses in ([0.04, 0.0], [0.0, 0.04]):
        inputs = [(numbers(2, 3), pause) for pause in pauses]
        taken = compiled.warm_up(lambda x, pause: time.sleep(pause), inputs)
        found.append(int(taken > 0.03) + int(taken > 5))
    return found


@probe
def default_backend():
    """What is chosen and said without a compiler, with one that fails, and with one that works."""
    found = []
    model, real = nn.Linear(3, 2), torch.compile
    with tempfile.TemporaryDirectory() as folder:
        for name, status in [("none", None), ("broken", 1), ("works", 0)]:
            path = Path(folder) / name
            path.mkdir()
            for program in ("g++", "clang++", "c++") if status is not None else ():
                (path / program).write_text(f"#!/bin/sh\nexit {status}\n")
                (path / program).chmod(0o755)
            for given in (None, "eager"):
                asked = []

                def record(*args, asked=asked, **kwargs):
                    asked += [kwargs.get("backend", "inductor"), str(kwargs.get("mode"))]
                    return real(*args, **kwargs | {"backend": "eager", "mode": None})

                sys.modules.pop("recsys.inference.compiled", None)
                environment = {k: v for k, v in os.environ.items() if k != "CXX"}
                with (
                    patch.dict(os.environ, environment | {"PATH": str(path)}, clear=True),
                    patch.object(torch, "compile", record),
                    warnings.catch_warnings(record=True) as caught,
                ):
                    warnings.simplefilter("always")
                    compiled.compile_model(model, backend=given, mode="max-autotune")
                kinds = [each.category.__name__ for each in caught]
                chosen = asked if "inductor" in asked else ["another"]  # which one is free
                found.append([*chosen, int("RuntimeWarning" in kinds), len(kinds)])
    sys.modules.pop("recsys.inference.compiled", None)
    return found
