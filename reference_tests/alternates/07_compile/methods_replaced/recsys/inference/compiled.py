"""Methods of the wrapper replaced; quartiles by hand; graphs from torch's own counter."""

import functools
import math
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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


def compile_model(model, *, backend=None, dynamic=None, mode=None):
    if backend is not None:
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic, mode=mode)
    elif compiler():
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, mode=mode)
    else:
        warnings.warn("C++ compiler missing, falling back to eager", RuntimeWarning, stacklevel=2)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for name in ("state_dict", "load_state_dict"):
        object.__setattr__(compiled, name, getattr(model, name))
    return compiled


@functools.lru_cache(maxsize=1)
def compiler():
    """The compiler, if it makes something of a program."""
    name = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if name is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "a.cpp")
        with open(source, "w") as file:
            file.write("int main() { return 0; }\n")
        command = [name, "-c", source, "-o", os.path.join(folder, "a.o")]
        return name if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0 else None


def leaves(value):
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)


def warm_up(function, inputs, *, grad=False):
    if not inputs or any(rows(arguments) < 2 for arguments in inputs):
        raise ValueError("a warm-up needs inputs, and two rows in each")
    begin = time.time()
    for arguments in inputs:
        if not grad:
            with torch.no_grad():
                function(*arguments)
            continue
        with torch.enable_grad():
            total = 0
            for output in leaves(function(*arguments)):
                if output.requires_grad:
                    total = total + output.sum()
            if isinstance(total, Tensor):
                inside = reached(total.grad_fn, {})
                kept = {leaf: leaf.grad for leaf in inside}
                copies = {leaf: None if g is None else g.clone() for leaf, g in kept.items()}
                total.backward()
                for leaf, gradient in kept.items():
                    if gradient is not None:
                        gradient.copy_(copies[leaf])
                    leaf.grad = gradient
    return time.time() - begin


def rows(arguments):
    for tensor in leaves(arguments):
        return tensor.shape[0] if tensor.dim() else 0
    return 0


def reached(node, seen):
    """The leaves that a gradient arrives at."""
    if node is None or node in seen:
        return []
    seen[node] = True
    here = [node.variable] if hasattr(node, "variable") else []
    return here + [leaf for parent, _ in node.next_functions for leaf in reached(parent, seen)]


def count_graphs(function, inputs, *, dynamic=None):
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    if not inputs:
        raise ValueError("no inputs, nothing to count")
    original = function
    if isinstance(function, nn.Module):
        original = getattr(function, "_orig_mod", function)
    elif hasattr(function, "_torchdynamo_orig_callable"):
        original = function._torchdynamo_orig_callable
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("eager")
    traced = torch.compile(original, backend=counter, dynamic=dynamic)
    try:
        frames = []
        for arguments in inputs:
            traced(*arguments)
            frames.append(counter.frame_count)
        breaks, reasons = 0, []
        for table in (counters["graph_break"], counters["unimplemented"]):
            for why, times in table.items():
                if "recompile limit" not in why:
                    breaks += times
                    reasons.append(" ".join(why.split())[:200])
    finally:
        torch._dynamo.reset()
        counters.clear()
    return CompileReport(frames[-1], breaks, frames[-1] - frames[0], tuple(reasons))


def quantile(values, share):
    """Linear interpolation between the two nearest."""
    position = share * (len(values) - 1)
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


def benchmark(functions, *, warmup=3, rounds=9, synchronize=None, clock=time.perf_counter):
    if not functions:
        raise ValueError("functions is empty")
    if warmup <= 0 or rounds <= 1:
        raise ValueError(f"warmup={warmup}, rounds={rounds}: too few")
    times = {name: [] for name in functions}
    first = {}
    for number in range(-warmup, rounds):
        for name, function in functions.items():
            if synchronize:
                synchronize()
            start = clock()
            function()
            if synchronize:
                synchronize()
            stop = clock()
            first.setdefault(name, stop - start)
            if number >= 0:
                times[name].append(stop - start)
    report = {}
    for name in functions:
        ordered = sorted(times[name])
        low, median, high = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        report[name] = Timing(median=median, low=low, high=high, first=first[name])
    return report


def pays_off(eager_seconds, compiled_seconds, compile_seconds, calls):
    values = (eager_seconds, compiled_seconds, compile_seconds, calls)
    if not all(0 <= x < math.inf for x in values):
        raise ValueError("not finite, or below 0")
    saved = calls * eager_seconds - calls * compiled_seconds
    return saved > compile_seconds
