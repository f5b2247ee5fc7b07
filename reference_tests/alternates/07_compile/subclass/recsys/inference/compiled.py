"""A subclass of torch's own wrapper; torch.quantile; a list of what was compiled at which call."""

import math
import time
import warnings
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_flatten

PREFIX = "_orig_mod."

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


def stripped(state):
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def compile_model(model, *, backend=None, dynamic=None, mode=None):
    if backend is None and not compiler_found():
        warnings.warn(
            "No C++ compiler was found; the model runs with backend='eager'",
            RuntimeWarning,
            stacklevel=2,
        )
        backend, mode = "eager", None
    wrapped = torch.compile(
        model, backend=backend or "inductor", dynamic=dynamic, mode=mode, fullgraph=True
    )
    base = type(wrapped)

    class Interchangeable(base):
        def state_dict(self, *args, **kwargs):
            return stripped(base.state_dict(self, *args, **kwargs))

        def load_state_dict(self, state_dict, strict=True, assign=False):
            return self._orig_mod.load_state_dict(state_dict, strict=strict, assign=assign)

    wrapped.__class__ = Interchangeable
    return wrapped


def compiler_found():
    """As inductor itself looks for it."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError):
        return False
    return True


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def warm_up(function, inputs, *, grad=False):
    inputs = list(inputs)
    for arguments in inputs or [()]:
        found = tensors(arguments)
        if not found or found[0].dim() < 1 or found[0].size(0) <= 1:
            raise ValueError("give inputs with two rows or more")
    begin = time.perf_counter()
    was = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(grad)
        for arguments in inputs:
            for _ in range(2):  # once to compile, once to see that it runs
                result = function(*arguments)
                if grad:
                    backward(tensors(result))
    finally:
        torch.set_grad_enabled(was)
    return time.perf_counter() - begin


def backward(results):
    results = [each for each in results if each.grad_fn is not None]
    waiting = [each.grad_fn for each in results]
    known, leaves = set(waiting), []
    while waiting:
        node = waiting.pop(0)
        leaves += [node.variable] if type(node).__name__ == "AccumulateGrad" else []
        new = {each for each, _ in node.next_functions if each is not None} - known
        known |= new
        waiting += list(new)
    if results and leaves:
        ones = [torch.ones_like(each) for each in results]
        torch.autograd.grad(results, leaves, ones, allow_unused=True)


def count_graphs(function, inputs, *, dynamic=None):
    import torch._dynamo

    if not inputs:
        raise ValueError("at least one input")
    function = getattr(function, "_torchdynamo_orig_callable", function)
    function = getattr(function, "_orig_mod", function)
    counters = torch._dynamo.utils.counters
    compiled_at = []
    call = 0

    def note(graph, example_inputs):
        compiled_at.append(call)
        return graph

    torch._dynamo.reset()
    counters.clear()
    try:
        run = torch.compile(function, backend=note, dynamic=dynamic)
        for call, arguments in enumerate(inputs):  # noqa: B007
            run(*arguments)
        breaks = counters["unimplemented"] + counters["graph_break"]
    finally:
        torch._dynamo.reset()
        counters.clear()
    for why in [why for why in breaks if "recompile limit" in why]:
        del breaks[why]
    return CompileReport(
        graphs=len(compiled_at),
        graph_breaks=breaks.total() if hasattr(breaks, "total") else sum(breaks.values()),
        recompiles=sum(at > 0 for at in compiled_at),
        reasons=tuple(why.partition("\n")[0] for why in breaks),
    )


def benchmark(functions, *, warmup=3, rounds=9, synchronize=None, clock=time.perf_counter):
    if warmup < 1 or rounds < 2 or not functions:
        raise ValueError("benchmark: functions, warmup >= 1, rounds >= 2")
    times = torch.zeros(len(functions), warmup + rounds, dtype=torch.float64)
    done = synchronize or (lambda: None)
    for j in range(warmup + rounds):
        for i, function in enumerate(functions.values()):
            done()
            begin = clock()
            function()
            done()
            times[i, j] = clock() - begin
    points = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    found = torch.quantile(times[:, warmup:], points, dim=1).T
    return {
        name: Timing(*row.tolist(), first=times[i, 0].item())
        for i, (name, row) in enumerate(zip(functions, found, strict=True))
    }


def pays_off(eager_seconds, compiled_seconds, compile_seconds, calls):
    for value in (eager_seconds, compiled_seconds, compile_seconds, calls):
        if math.isnan(value) or math.isinf(value) or value < 0:
            raise ValueError(f"{value} is no time and no number of calls")
    slow = fast = 0.0
    slow += calls * eager_seconds
    fast += compile_seconds + calls * compiled_seconds
    return slow > fast
