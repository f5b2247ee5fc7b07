"""Compiled models: one graph, counted, timed honestly, and used where it pays (kata 07)."""

from __future__ import annotations

import functools
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Function = Callable[..., Any]


def compile_model(
    model: nn.Module,
    *,
    backend: str | Function | None = None,
    dynamic: bool | None = None,
    mode: str | None = None,
) -> nn.Module:
    """The model as one compiled graph that shares its weights; nothing compiles before a call.

    - **One graph or an error**: what cannot be traced whole raises a RuntimeError at the call that
      meets it; it is never cut in pieces that run slowly and silently.
    - **Few graphs**: over batches of changing size at most three are compiled (the first size, any
      size, and one row, which always has a graph of its own).
    - **The model stays as it is**: it can still be called without compilation, and training,
      ``eval()``, loading and moving act on both, since both are the same parameters and modules.
    - **Interchangeable checkpoints**: ``state_dict()`` of the result has the keys of the model's
      (no ``_orig_mod.``), and each loads what the other saved, with ``strict=True``: a key that is
      missing or not expected is an error.

    Args:
        backend: a name or a function, as for :func:`torch.compile`. None: ``"inductor"`` where its
            C++ compiler works (``CXX``, else g++; clang++ on a Mac, cl on Windows), that is, can
            be run and accepts a program; else ``"eager"``, which traces but generates no code,
            after a RuntimeWarning that says that there is no compiler.
        dynamic: True makes sizes symbolic from the first call, False compiles each size anew, None
            after a second size was seen.
        mode: handed on to :func:`torch.compile`; dropped where "eager" stands in.
            ``"reduce-overhead"`` replays CUDA graphs: there an output is overwritten by the next
            call, so clone what has to live longer.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> compiled = compile_model(model, backend="eager")
        >>> list(compiled.state_dict())
        ['weight', 'bias']
    """
    if backend is None:
        backend = "inductor"
        if not _has_compiler():
            backend, mode = "eager", None
            warnings.warn(
                "no C++ compiler works here (CXX, or the usual one): the model is traced but not "
                "compiled (backend 'eager') and will not be faster",
                RuntimeWarning,
                stacklevel=2,
            )
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic, mode=mode)
    # the wrapper keeps the model as a child called _orig_mod: saved files should not know
    compiled.register_state_dict_post_hook(_without_wrapper)
    compiled.register_load_state_dict_pre_hook(_with_wrapper)
    return compiled


def warm_up(function: Function, inputs: Sequence[tuple[Any, ...]], *, grad: bool = False) -> float:
    """Pay for compilation now: call the function on each input as it is going to be called later.

    Code is compiled for a gradient mode and for kinds of sizes; later calls are free only if the
    warm-up met both. Give batches of two different sizes if sizes are going to change.

    Args:
        inputs: argument tuples; tensors in them are leaves (no ``grad_fn``). The first tensor in
            each (inside dicts, lists, tuples too) must have two rows or more: sizes 0 and 1 are
            special cases with code of their own. All are looked at before anything is called; then
            each is run, once or more.
        grad: False as for serving, under ``torch.no_grad()``. True as for training: with
            gradients, and a backward pass from the sum of the outputs that need one. No ``.grad``
            of a parameter or an input is left or changed. The gradient mode of the caller does not
            matter, and stays.

    Returns:
        Seconds that it took, with compilation, all inputs together.

    Raises:
        ValueError: no inputs, or one whose first tensor has fewer than two rows.
    """
    if not inputs:
        raise ValueError("a warm-up needs at least one input")
    for arguments in inputs:
        tensors = (x for x in tree_leaves(arguments) if isinstance(x, Tensor))
        rows = next((x.shape[:1].numel() for x in tensors), 0)  # 1 for a 0-dim tensor
        if rows < 2:
            raise ValueError(
                f"a warm-up needs at least two rows, not {rows}: one row is compiled as a special "
                "case, and the first real batch would compile again"
            )
    start = time.perf_counter()
    for arguments in inputs:
        with torch.set_grad_enabled(grad):
            outputs = [x for x in tree_leaves(function(*arguments)) if isinstance(x, Tensor)]
            total = [x.sum() for x in outputs if x.requires_grad]
            if total:
                leaves = [x for x in _graph_leaves(total) if x.requires_grad]
                torch.autograd.grad(sum(total), leaves, allow_unused=True)
    return time.perf_counter() - start


@dataclass(frozen=True)
class CompileReport:
    """What compilation did with some calls.

    Attributes:
        graphs: graphs that were compiled.
        graph_breaks: places at which tracing had to stop, each time that they were compiled; 0 is
            what one wants. That dynamo gives up compiling anew (its limit) is no break.
        recompiles: graphs that calls after the first one added.
        reasons: why it broke, one line for each kind of reason.
    """

    graphs: int
    graph_breaks: int
    recompiles: int
    reasons: tuple[str, ...] = ()


def count_graphs(
    function: Function, inputs: Sequence[tuple[Any, ...]], *, dynamic: bool | None = None
) -> CompileReport:
    """Call a function or model on the inputs, in order, and count what dynamo compiles for them.

    Tracing alone is counted, with a backend that generates no code, so it needs no compiler and
    takes little time. Graph breaks are allowed, that they can be counted. The count begins in a
    clean state and leaves one (``torch._dynamo.reset``): what was compiled or counted before has
    no part in it, and compiled models will compile again at their next call. The function itself
    stays as it is, and is called once for each input.

    Args:
        function: a module or function, compiled or not; if compiled, the original is looked at.
        inputs: argument tuples, at least one. The calls run in the caller's gradient mode.

    Raises:
        ValueError: no inputs.
    """
    import torch._dynamo  # half a second, so only where it is needed
    from torch._dynamo.utils import counters

    if not inputs:
        raise ValueError("counting graphs needs at least one input")
    graphs = 0

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Function:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    try:
        traced = torch.compile(function, backend=backend, dynamic=dynamic)
        traced(*inputs[0])
        after_first = graphs
        for arguments in inputs[1:]:
            traced(*arguments)
        # a break is filed under either name; running into the recompile limit is none
        found = counters["graph_break"] + counters["unimplemented"]
        found = {why: n for why, n in found.items() if "recompile limit" not in why}
    finally:
        torch._dynamo.reset()
        counters.clear()
    reasons = tuple(why.splitlines()[0] for why in found)
    return CompileReport(graphs, sum(found.values()), graphs - after_first, reasons)


@dataclass(frozen=True)
class Timing:
    """Seconds of a call.

    Attributes:
        median, low, high: of the measured rounds: the median and the quartiles (25 % and 75 %,
            linear interpolation).
        first: of the first call of all, which pays for compilation.
    """

    median: float
    low: float
    high: float
    first: float


def benchmark(
    functions: Mapping[str, Callable[[], Any]],
    *,
    warmup: int = 3,
    rounds: int = 9,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions side by side, so that the comparison is fair.

    - Each is called ``warmup`` times before anything counts: the first calls compile and allocate.
    - They are interleaved: every round calls each function once, so that a machine that becomes
      slower slows all of them down.
    - A device works on after a call has returned: with ``synchronize``, time is taken when the
      device has done the work, and work that was waiting before does not count.

    Args:
        functions: name to a function without arguments, at least one.
        warmup: at least 1. rounds: at least 2.
        synchronize: waits for the device, ``torch.cuda.synchronize`` say. None: no device.
        clock: seconds, from any start.

    Returns:
        A :class:`Timing` for each name, in the order given.

    Raises:
        ValueError: no functions, warmup below 1, rounds below 2.
    """
    if not functions or warmup < 1 or rounds < 2:
        raise ValueError(
            "a benchmark needs functions, a warmup of at least 1 and 2 rounds or more, "
            f"not {len(functions)} functions, warmup {warmup}, rounds {rounds}"
        )
    wait = synchronize or (lambda: None)

    def seconds(function: Callable[[], Any]) -> float:
        wait()
        start = clock()
        function()
        wait()
        return clock() - start

    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(warmup + rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    result = {}
    for name, (first, *taken) in times.items():
        low, median, high = statistics.quantiles(taken[warmup - 1 :], n=4, method="inclusive")
        result[name] = Timing(median, low, high, first)
    return result


def pays_off(
    eager_seconds: float, compiled_seconds: float, compile_seconds: float, calls: int
) -> bool:
    """Whether compiling once and calling ``calls`` times takes less time than calling as it is.

    Args:
        eager_seconds, compiled_seconds: of a call. compile_seconds: once, on top of the calls.
            All in one unit, finite and not below 0.
        calls: how many are to come, not below 0.

    Returns:
        True only if it is a gain: an equal time is none.

    Raises:
        ValueError: an argument below 0 or not finite.
    """
    for value in (eager_seconds, compiled_seconds, compile_seconds, calls):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"times and calls must be finite and at least 0, not {value}")
    return compile_seconds + calls * compiled_seconds < calls * eager_seconds


@functools.cache
def _has_compiler() -> bool:
    """Whether the C++ compiler that inductor takes is there and accepts a program."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    asked = ["/help"] if sys.platform == "win32" else ["-x", "c++", "-fsyntax-only", "-"]
    command = [os.environ.get("CXX") or usual, *asked]
    program = b"#include <cmath>\nint main() { return 0; }\n"
    try:
        subprocess.run(command, input=program, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _without_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    inner = prefix + "_orig_mod."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _with_wrapper(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + "_orig_mod." + key.removeprefix(prefix)] = state.pop(key)


def _graph_leaves(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that the outputs were computed from and that collect gradients."""
    waiting, seen, leaves = [x.grad_fn for x in outputs], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [parent for parent, _ in node.next_functions]
    return leaves
