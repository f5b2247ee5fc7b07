"""Dynamo's own entry points instead of torch.compile; times in columns of pandas' quantiles."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves


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


def hooks(compiled):
    """Rename keys in the dictionaries that go out and come in."""

    def leaving(module, state, prefix, metadata):
        for key in list(state):
            state[key.replace("_orig_mod.", "", 1)] = state.pop(key)

    def coming(module, state, prefix, *rest):
        for key in list(state):
            state[f"{prefix}_orig_mod.{key[len(prefix):]}"] = state.pop(key)

    compiled._register_state_dict_hook(leaving)
    compiled.register_load_state_dict_pre_hook(coming)
    return compiled


def compile_model(model, *, backend=None, dynamic=None, mode=None):
    if backend is None and not has_cxx():
        warnings.warn("No C++ compiler: backend 'eager'", RuntimeWarning, stacklevel=2)
        return hooks(torch._dynamo.optimize("eager", nopython=True, dynamic=dynamic)(model))
    return hooks(
        torch.compile(
            model, fullgraph=True, backend=backend or "inductor", dynamic=dynamic, mode=mode
        )
    )


def has_cxx():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        if sys.platform == "win32":
            return True
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.check_output([path, "--version"], stderr=subprocess.STDOUT)
            return True
    return False


def warm_up(function, inputs, *, grad=False):
    for arguments in inputs:
        leaves = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        if not leaves or leaves[0].dim() == 0 or leaves[0].shape[0] < 2:
            raise ValueError("each input needs two rows")
    if not inputs:
        raise ValueError("no inputs")
    begin = time.perf_counter()
    context = torch.enable_grad if grad else torch.no_grad
    for arguments in inputs:
        with context():
            outputs = tree_leaves(function(*arguments))
            outputs = [x for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]
            nodes = [x.grad_fn for x in outputs]
            for node in nodes:  # grows while it is walked
                nodes += [p for p, _ in node.next_functions if p is not None and p not in nodes]
            ends = [node.variable for node in nodes if hasattr(node, "variable")]
            if ends:
                torch.autograd.grad(torch.stack([x.sum() for x in outputs]).sum(), set(ends))
    return time.perf_counter() - begin


def count_graphs(function, inputs, *, dynamic=None):
    from torch._dynamo.utils import counters

    if not inputs:
        raise ValueError("no inputs")
    while hasattr(function, "_torchdynamo_orig_callable"):
        function = function._torchdynamo_orig_callable
    graphs = [0]

    def backend(graph, example_inputs):
        graphs[-1] += 1
        return graph.forward

    with contextlib.ExitStack() as stack:
        stack.callback(counters.clear)
        stack.callback(torch._dynamo.reset)
        torch._dynamo.reset()
        counters.clear()
        run = torch._dynamo.optimize(backend, dynamic=dynamic)(function)
        for arguments in inputs:
            run(*arguments)
            graphs.append(0)
        found = {**counters["graph_break"], **counters["unimplemented"]}
        found = {k: v for k, v in found.items() if "recompile limit" not in k}
        reasons = tuple(why.splitlines()[0][:120] for why in found)
        return CompileReport(sum(graphs), sum(found.values()), sum(graphs[1:]), reasons)


def benchmark(functions, *, warmup=3, rounds=9, synchronize=None, clock=time.perf_counter):
    import pandas as pd

    if not functions or warmup < 1 or rounds < 2:
        raise ValueError(f"{len(functions)} functions, warmup={warmup}, rounds={rounds}")
    rows = []
    for _ in range(warmup + rounds):
        row = []
        for function in functions.values():
            if synchronize is not None:
                synchronize()
            start = clock()
            function()
            if synchronize is not None:
                synchronize()
            row.append(clock() - start)
        rows.append(row)
    table = pd.DataFrame(rows)
    counted = table.iloc[warmup:]
    median, low, high = (counted.quantile(share).tolist() for share in (0.5, 0.25, 0.75))
    first = table.iloc[0].tolist()
    columns = zip(functions, median, low, high, first, strict=True)
    return {name: Timing(*times) for name, *times in columns}


def pays_off(eager_seconds, compiled_seconds, compile_seconds, calls):
    total = eager_seconds + compiled_seconds + compile_seconds + calls
    if not math.isfinite(total) or min(eager_seconds, compiled_seconds, compile_seconds, calls) < 0:
        raise ValueError("an argument is below 0 or not finite")
    return compile_seconds < calls * eager_seconds - calls * compiled_seconds
