"""A module of its own around the compiled callable; NumPy's quantiles; dynamo's own statistics."""

import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_iter


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


class Compiled(nn.Module):
    def __init__(self, plain, **options):
        super().__init__()
        self.plain = plain
        self.__dict__["run"] = torch.compile(plain, **options)  # not a child: the weights once

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)

    def train(self, mode=True):
        self.training = mode
        self.plain.train(mode)
        return self

    def state_dict(self, *args, **kwargs):
        return self.plain.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.plain.load_state_dict(*args, **kwargs)


def can_compile():
    default = "cl" if sys.platform == "win32" else "clang++" if sys.platform == "darwin" else "g++"
    compiler = shutil.which(os.environ.get("CXX", default))
    if not compiler:
        return False
    option = "/help" if sys.platform == "win32" else "--version"
    return subprocess.call([compiler, option], stdout=-3, stderr=-3) == 0


def compile_model(model, *, backend=None, dynamic=None, mode=None):
    options = {"fullgraph": True, "dynamic": dynamic, "mode": mode, "backend": backend}
    if backend is None:
        if can_compile():
            options["backend"] = "inductor"
        else:
            warnings.warn("there is no C++ compiler: eager", RuntimeWarning, stacklevel=2)
            options.update(backend="eager", mode=None)
    return Compiled(model, **options)


def warm_up(function, inputs, *, grad=False):
    if len(inputs) == 0:
        raise ValueError("nothing to warm up with")
    for arguments in inputs:
        first = [x for x in tree_iter(arguments) if torch.is_tensor(x)][0]
        if first.ndim == 0 or first.shape[0] < 2:
            raise ValueError(f"two rows or more, not {tuple(first.shape)}")
    begin = time.monotonic()
    for arguments in inputs:
        run = trained if grad else served
        run(function, arguments)
    return time.monotonic() - begin


@torch.no_grad()
def served(function, arguments):
    function(*arguments)


@torch.enable_grad()
def trained(function, arguments):
    out = function(*arguments)
    ends = [x for x in tree_iter(out) if torch.is_tensor(x) and x.requires_grad]
    if not ends:
        return
    leaves = {}

    def visit(node):
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            if hasattr(node, "variable"):
                leaves[id(node.variable)] = node.variable
            for parent, _ in node.next_functions:
                visit(parent)

    seen = set()
    for end in ends:
        visit(end.grad_fn)
    before = [(leaf, leaf.grad) for leaf in leaves.values()]
    for leaf, _ in before:
        leaf.grad = None
    torch.stack([end.sum().double() for end in ends]).sum().backward()
    for leaf, gradient in before:
        leaf.grad = gradient


def count_graphs(function, inputs, *, dynamic=None):
    from torch._dynamo.utils import counters

    if not len(inputs):
        raise ValueError("no inputs")
    if isinstance(function, Compiled):
        function = function.plain
    while hasattr(function, "_orig_mod"):
        function = function._orig_mod
    function = getattr(function, "_torchdynamo_orig_callable", function)

    def clean():
        torch.compiler.reset()
        counters.clear()

    clean()
    totals = []
    try:
        run = torch.compile(function, backend=lambda graph, example: graph, dynamic=dynamic)
        for arguments in inputs:
            run(*arguments)
            totals.append(counters["stats"]["unique_graphs"])
        reasons = {
            why: times
            for kind in ("graph_break", "unimplemented")
            for why, times in counters[kind].items()
            if "recompile limit" not in why and "recompile_limit" not in why
        }
        lines = tuple(why.split("\n")[0] for why in reasons)
        return CompileReport(
            totals[-1], sum(reasons.values()), totals[-1] - totals[0], lines
        )
    finally:
        clean()


def benchmark(functions, *, warmup=3, rounds=9, synchronize=None, clock=time.perf_counter):
    if len(functions) == 0:
        raise ValueError("no functions")
    if warmup < 1:
        raise ValueError("warmup must be at least 1")
    if rounds < 2:
        raise ValueError("rounds must be at least 2")

    def measure(function):
        if synchronize is not None:
            synchronize()
        begin = clock()
        function()
        if synchronize is not None:
            synchronize()
        return clock() - begin

    names = list(functions)
    first = {}
    for name in names:
        first[name] = measure(functions[name])
        for _ in range(warmup - 1):
            measure(functions[name])
    table = np.empty((rounds, len(names)))
    for row in range(rounds):
        order = range(len(names)) if row % 2 == 0 else reversed(range(len(names)))
        for column in order:  # there and back: fair to the last one
            table[row, column] = measure(functions[names[column]])
    low, median, high = np.quantile(table, [0.25, 0.5, 0.75], axis=0)
    return {
        name: Timing(float(median[i]), float(low[i]), float(high[i]), first[name])
        for i, name in enumerate(names)
    }


def pays_off(eager_seconds, compiled_seconds, compile_seconds, calls):
    values = np.array([eager_seconds, compiled_seconds, compile_seconds, calls], dtype=float)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("times and calls: finite, not below 0")
    return bool(calls * eager_seconds > compile_seconds + calls * compiled_seconds)
