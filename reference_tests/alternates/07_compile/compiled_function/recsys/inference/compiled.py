"""Compiles a function that calls the model, inside a module that borrows the model's children."""

import math
import statistics as st
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class CompileReport:
    graphs: int
    graph_breaks: int
    recompiles: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    median: float
    low: float
    high: float
    first: float


def working_compiler():
    import os

    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    try:
        subprocess.run(
            [name, "-E", "-x", "c++", "-"], input=b"int x;", check=True, capture_output=True
        )
    except Exception:
        return False
    return True


def compile_model(model, *, backend=None, dynamic=None, mode=None):
    if backend is None:
        backend = "inductor" if working_compiler() else "eager"
        if backend == "eager":
            mode = None
            warnings.warn("eager: no working C++ compiler", RuntimeWarning, stacklevel=2)

    def call(*args, **kwargs):
        return model(*args, **kwargs)

    run = torch.compile(call, backend=backend, dynamic=dynamic, mode=mode, fullgraph=True)

    class Fast(nn.Module):
        """Has the very parameters, buffers and children of the model, under the same names."""

        def __init__(self):
            super().__init__()
            self._parameters = model._parameters
            self._buffers = model._buffers
            self._modules = model._modules
            self._non_persistent_buffers_set = model._non_persistent_buffers_set

        def forward(self, *args, **kwargs):
            return run(*args, **kwargs)

        def train(self, mode=True):
            model.train(mode)
            return super().train(mode)

        plain = property(lambda self: model)

    fast = Fast()
    fast.training = model.training
    return fast


def flat(value):
    if torch.is_tensor(value):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [x for each in value for x in flat(each)]
    return []


def warm_up(function, inputs, *, grad=False):
    if not inputs:
        raise ValueError("no inputs")
    for arguments in inputs:
        first, *_ = flat(arguments) or [torch.zeros(())]
        if first.dim() == 0 or first.size(0) in (0, 1):
            raise ValueError(f"first tensor {tuple(first.shape)}: two rows at least")
    start = time.perf_counter()
    for arguments in inputs:
        with torch.set_grad_enabled(grad):
            outputs = [x for x in flat(function(*arguments)) if x.requires_grad]
            if outputs:
                end = sum(x.sum() for x in outputs)
                todo, leaves = {end.grad_fn}, {}
                done = set()
                while todo:
                    node = todo.pop()
                    done.add(node)
                    if hasattr(node, "variable"):
                        leaves[id(node.variable)] = node.variable
                    todo |= {p for p, _ in node.next_functions if p is not None and p not in done}
                torch.autograd.grad(end, tuple(leaves.values()), allow_unused=True)
    return time.perf_counter() - start


class Tally:
    """A backend that only writes down."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward


def count_graphs(function, inputs, *, dynamic=None):
    if len(list(inputs)) < 1:
        raise ValueError("inputs is empty")
    from torch._dynamo import utils

    function = getattr(function, "plain", function)
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        function = getattr(function, name, function)
    tally, history = Tally(), []
    torch.compiler.reset()
    utils.counters.clear()
    try:
        for arguments in inputs:
            torch.compile(function, backend=tally, dynamic=dynamic)(*arguments)
            history.append(len(tally.graphs))
        breaks = Counter(utils.counters["graph_break"])
        breaks.update(utils.counters["unimplemented"])
    finally:
        utils.counters.clear()
        torch.compiler.reset()
    breaks = {why: n for why, n in breaks.items() if "recompile limit" not in why}
    first, *_, last = history[:1] + history
    why = [text.strip().split("\n")[0] for text in breaks]
    return CompileReport(last, sum(breaks.values()), last - first, tuple(why))


def benchmark(functions, *, warmup=3, rounds=9, synchronize=None, clock=time.perf_counter):
    if len(functions) < 1 or warmup < 1 or rounds < 2:
        raise ValueError("too little to measure")

    def ready():
        if synchronize is not None:
            synchronize()
        return clock()

    def once(function):
        began = ready()
        function()
        return ready() - began

    warm = {name: [once(f) for _ in range(warmup)] for name, f in functions.items()}
    measured = [{name: once(f) for name, f in functions.items()} for _ in range(rounds)]
    out = {}
    for name in functions:
        times = [each[name] for each in measured]
        low, _, high = st.quantiles(times, n=4, method="inclusive")
        out[name] = Timing(median=st.median(times), low=low, high=high, first=warm[name][0])
    return out


def pays_off(eager_seconds, compiled_seconds, compile_seconds, calls):
    numbers = [float(x) for x in (eager_seconds, compiled_seconds, compile_seconds, calls)]
    if any(not math.isfinite(x) or x < 0 for x in numbers):
        raise ValueError(f"impossible: {numbers}")
    if calls == 0:
        return False
    return compile_seconds / calls < eager_seconds - compiled_seconds
