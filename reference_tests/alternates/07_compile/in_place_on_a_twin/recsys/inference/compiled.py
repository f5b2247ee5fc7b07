"""A twin of the model that shares its attributes gets another forward; the rest in classes."""

import copy
import enum
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree


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


def twin_of(model):
    """Another object with the same dictionaries: parameters, buffers, children are the same."""
    twin = copy.copy(model)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = model.__dict__[name]
    return twin


class Both:
    """Mixed into the twin's class: the mode is the model's too."""

    def train(self, mode=True):
        self.__dict__["_model_of"][0].train(mode)
        self.training = mode
        return self

    @property
    def training(self):
        return self.__dict__["_model_of"][0].training

    @training.setter
    def training(self, mode):
        self.__dict__["_model_of"][0].training = mode


def compile_model(model, *, backend=None, dynamic=None, mode=None):
    chosen = backend
    if backend is None:
        chosen = "inductor"
        if not Compiler.usual().works():
            warnings.warn(RuntimeWarning("no C++ compiler: backend 'eager'"), stacklevel=2)
            chosen, mode = "eager", None
    twin = twin_of(model)
    del twin.__dict__["training"]
    twin.__dict__["_model_of"] = (model,)
    twin.__class__ = type(type(model).__name__, (Both, type(model)), {})
    run = torch.compile(model, fullgraph=True, backend=chosen, dynamic=dynamic, mode=mode)
    twin.__dict__["forward"] = run
    return twin


class Compiler:
    def __init__(self, name):
        self.path = shutil.which(name)

    @classmethod
    def usual(cls):
        names = {"linux": "g++", "darwin": "clang++", "win32": "cl"}
        return cls(os.getenv("CXX") or names.get(sys.platform, "g++"))

    def works(self):
        if self.path is None or os.name == "nt":
            return self.path is not None
        done = subprocess.run([self.path, "--version"], capture_output=True)
        return done.returncode == 0


class Grad(enum.Enum):
    SERVING = False
    TRAINING = True

    def run(self, function, arguments):
        with torch.set_grad_enabled(self.value):
            outputs = function(*arguments)
            if self is Grad.TRAINING:
                self.backward(outputs)

    @staticmethod
    def backward(outputs):
        sums = []
        pytree.tree_map_only(
            torch.Tensor, lambda x: sums.append(x.sum()) if x.requires_grad else None, outputs
        )
        if not sums:
            return
        stack, leaves, seen = [s.grad_fn for s in sums], [], set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
        torch.autograd.grad(sums, leaves, allow_unused=True)


def warm_up(function, inputs, *, grad=False):
    if not inputs:
        raise ValueError("inputs are missing")
    for arguments in inputs:
        shapes = [tuple(x.shape) for x in pytree.tree_leaves(arguments) if torch.is_tensor(x)]
        if not shapes or not shapes[0] or shapes[0][0] < 2:
            raise ValueError(f"needs two rows or more: {shapes[:1]}")
    begin = time.perf_counter_ns()
    for arguments in inputs:
        Grad(bool(grad)).run(function, arguments)
    return (time.perf_counter_ns() - begin) / 1e9


class Counting:
    """Counts while it is entered."""

    def __init__(self):
        from torch._dynamo.utils import counters

        self.counters, self.graphs = counters, 0

    def clean(self):
        torch._dynamo.reset()
        self.counters.clear()

    def __enter__(self):
        self.clean()
        return self

    def __exit__(self, *error):
        self.clean()

    def backend(self, graph, example):
        self.graphs += 1
        return graph

    def breaks(self):
        both = [*self.counters["graph_break"].items(), *self.counters["unimplemented"].items()]
        return [(why, times) for why, times in both if "recompile limit" not in why]


def original(function):
    model = getattr(function, "__dict__", {}).get("_model_of")
    if model is not None:
        return model[0]
    if isinstance(function, nn.Module):
        return getattr(function, "_orig_mod", function)
    return getattr(function, "_torchdynamo_orig_callable", function)


def count_graphs(function, inputs, *, dynamic=None):
    if not inputs:
        raise ValueError("no inputs")
    with Counting() as counting:
        traced = torch.compile(original(function), backend=counting.backend, dynamic=dynamic)
        first = None
        for arguments in inputs:
            traced(*arguments)
            first = counting.graphs if first is None else first
        breaks = counting.breaks()
    lines = tuple(why.splitlines()[0] for why, _ in breaks)
    total = sum(times for _, times in breaks)
    return CompileReport(counting.graphs, total, counting.graphs - first, lines)


@dataclass
class Stopwatch:
    clock: object
    wait: object

    def __call__(self, function):
        self.wait()
        start = self.clock()
        function()
        self.wait()
        return self.clock() - start


def benchmark(functions, *, warmup=3, rounds=9, synchronize=None, clock=time.perf_counter):
    if not functions or not warmup >= 1 or not rounds >= 2:
        raise ValueError("needs functions, warmup >= 1 and rounds >= 2")
    watch = Stopwatch(clock, synchronize if synchronize is not None else (lambda: None))
    times = {name: [] for name in functions}
    for _ in range(warmup):
        for name in functions:
            times[name].append(watch(functions[name]))
    first = {name: each[0] for name, each in times.items()}
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name in functions:
            times[name].append(watch(functions[name]))

    def at(values, share):
        values = sorted(values)
        whole, part = divmod(share * (len(values) - 1), 1)
        near = values[int(whole)]
        return near + part * (values[min(int(whole) + 1, len(values) - 1)] - near)

    return {
        name: Timing(at(each, 0.5), at(each, 0.25), at(each, 0.75), first[name])
        for name, each in times.items()
    }


def pays_off(eager_seconds, compiled_seconds, compile_seconds, calls):
    for each in (eager_seconds, compiled_seconds, compile_seconds, calls):
        if not -0.0 <= each <= sys.float_info.max or math.isnan(each):
            raise ValueError(f"{each} cannot be")
    eager = calls * eager_seconds
    return eager - compile_seconds > calls * compiled_seconds
