"""Device bugs, found on a machine without an accelerator.

    >>> def scenario(device):
    ...     x = torch.ones(3, device=device)
    ...     return x + torch.arange(3)  # made on the CPU: fails on every GPU
    >>> other_device_findings(scenario).findings[0].text
    'add mixed a tensor on the device ([3], float32) with one on the CPU ([3], int64)'

The tensors of the scenario are wrappers: they keep their values on the CPU and say that they are
elsewhere, to Python (`x.device` is cuda:0) and to torch itself. What mixes them with tensors of the
CPU, and would fail on a GPU, is a finding; so is a result that lies on the CPU. All else that goes
wrong (an operation that wrappers do not support, a timeout, a crash) is inconclusive. Waiting for
the device is counted too, and here it is told from reading a tensor that is on the CPU anyway.

To torch the wrappers are on the device type `lazy`. `privateuse1` would do in a fresh process only:
autograd makes its queues at the first backward pass, and one that has run already has none for a
device that is registered later. For `lazy` it uses the CPU's.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import os
import pickle
import select
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from harness.cost import Cost, Meter, Place, eagerly, is_view, storage, sync_of_function

CLAIMED = torch.device("cuda", 0)  # what Python sees
REAL = torch.device("lazy", 0)  # what torch sees
SECONDS = 20.0


@dataclass
class Finding:
    """A device bug: what was wrong, the learner's line, and where the CPU tensor was made."""

    text: str
    place: Place | None = None
    made: Place | None = None


@dataclass
class DeviceRun:
    """What a scenario did on another device.

    `cost` is what it cost there; its `syncs` are real ones. `inconclusive` says why nothing is
    known of what came after; it is empty where the scenario came to its end.
    """

    findings: list[Finding] = field(default_factory=list)
    inconclusive: str = ""
    cost: Cost = field(default_factory=Cost)


def other_device_findings(
    scenario: Callable[[torch.device], Any], *, seconds: float = SECONDS
) -> DeviceRun:
    """Run `scenario(device)` on a device that is not the CPU.

    Args:
        scenario: makes its modules and inputs on `device` and returns tensors, modules or
            containers of them, all of which must be there. Returns it a function, then that is
            called next, and only what it does is counted: the preparation is not.
        seconds: after which it is given up, where it can run in a child process.

    Runs in a child forked from this process, so that nothing that goes wrong there harms it; in
    this one where a fork is not safe (no Linux, or a GPU whose threads a fork would lose).
    """
    if sys.platform == "linux" and hasattr(os, "fork") and not torch.cuda.is_available():
        return forked(lambda: observe(scenario), seconds)
    return observe(scenario)


# --- the run --------------------------------------------------------------------------------------


def observe(scenario: Callable[[torch.device], Any]) -> DeviceRun:
    """The scenario in this process."""
    run = DeviceRun()
    meter = DeviceMeter()
    try:
        with elsewhere(meter):
            result = scenario(CLAIMED)
            if isinstance(result, types.FunctionType):
                meter.cost = Cost()
                result = result()
            quietly_left = list(left_behind(result))
        for name, tensor in quietly_left:
            text = f"{name or 'the result'} is on the CPU ({described(tensor)})"
            run.findings.append(Finding(text, made=meter.made.get(storage(tensor))))
    except WrongDevice as error:
        run.findings.append(error.finding)
    except BaseException as error:  # pytest's outcomes are no Exceptions
        wrong = next((e for e in chain(error) if isinstance(e, WrongDevice)), None)
        if wrong is not None:
            run.findings.append(wrong.finding)
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        else:
            run.inconclusive = f"{type(error).__name__}: {error}"
    run.cost = dataclasses.replace(meter.cost, result=None)
    return run


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def left_behind(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a result that are on the CPU, with their names."""
    if isinstance(value, Tensor):
        if not isinstance(value, Elsewhere):
            yield name, value
        return
    if isinstance(value, torch.nn.Module):
        value = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        for key, each in value.items():
            yield from left_behind(each, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            yield from left_behind(each, f"{name or 'result'}[{i}]")


def forked(work: Callable[[], DeviceRun], seconds: float) -> DeviceRun:
    """`work()` in a forked child; what it returned, or that it did not."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child uses none of them
        child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            gc.disable()
            faulthandler.disable()  # a crash here is no news
            torch.set_num_threads(1)  # the parent's other threads are not there: do not wait
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(pickle.dumps(work()))
        finally:
            os._exit(0)
    os.close(writer)
    data, deadline = b"", time.monotonic() + seconds
    try:
        while True:
            if not select.select([reader], [], [], max(deadline - time.monotonic(), 0))[0]:
                return DeviceRun(inconclusive=f"it took longer than {seconds:g} s")
            part = os.read(reader, 65536)
            if not part:
                break
            data += part
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)  # it has ended, or it must
        os.waitpid(child, 0)
    return pickle.loads(data) if data else DeviceRun(inconclusive="the process ended early")


# --- the device -----------------------------------------------------------------------------------


class WrongDevice(RuntimeError):
    """What torch raises on a GPU."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


class Elsewhere(Tensor):
    """A tensor whose values are in `inner`, on the CPU, and that says it is on a device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=REAL,
        )
        self.inner = inner
        return self

    @property
    def device(self) -> torch.device:
        # torch's own Python code, below the function mode, must name what torch knows
        return REAL if DeviceFunctions.inside else CLAIMED

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_: Any) -> str:
        return f"tensor(..., size={tuple(self.shape)}, device='{CLAIMED}')"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # saved; torch.load says where it comes back

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {}, None)  # on a thread without the modes


class DeviceMeter(Meter):
    """Counts what waits for the device, and remembers where CPU tensors were made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Place | None] = {}

    def on_device(self, value: Any) -> bool:
        return isinstance(value, Elsewhere)

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        super().saw(func, args, kwargs, out)
        if not is_view(func) or func._schema.name == "aten::lift_fresh":
            for each in tree_leaves(out):
                if isinstance(each, Tensor) and not isinstance(each, Elsewhere):
                    self.made[storage(each)] = self.place()


class DeviceOperations(TorchDispatchMode):
    _should_skip_dynamo = classmethod(lambda cls: False)  # which costs a second to import

    def __init__(self, meter: DeviceMeter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = dispatch(func, args, kwargs, self.meter)
        self.meter.saw(func, args, kwargs, out)
        return out


def dispatch(func: Any, args: tuple, kwargs: dict, meter: DeviceMeter | None) -> Any:
    """Check where the arguments are, run on the CPU, and wrap what belongs on the device."""
    name = func._schema.name.rpartition("::")[2]
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = any(isinstance(each, Elsewhere) for each in given)
    asked = kwargs.get("device")
    if asked is not None:
        there_after = asked.type in (REAL.type, CLAIMED.type)
        kwargs = {**kwargs, "device": torch.device("cpu")} if there_after else kwargs
    else:
        there_after = there
    if there:
        check_mixed(name, func, args, kwargs, meter)
    check_generator(name, kwargs, there_after, meter)
    if not there and not there_after:
        return func(*args, **kwargs)
    bare_args, bare_kwargs = tree_map_only(Elsewhere, lambda x: x.inner, (args, kwargs))
    out = func(*bare_args, **bare_kwargs)
    if name == "copy_":
        return args[0]
    if not there_after:
        return out
    out = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
CROSSING = {"copy_", "_to_copy", "_foreach_copy_", "_has_compatible_shallow_copy_type"}
CROSSING |= {"_pack_padded_sequence"}  # its lengths are on the CPU
STRICT = {"cat", "stack", "embedding"}  # refuse even a 0-dim tensor of the CPU


def check_mixed(name: str, func: Any, args: tuple, kwargs: dict, meter: Any) -> None:
    """Raise what a GPU would raise; where torch lets some mixtures pass, so does this."""
    if name in CROSSING:
        return
    checked: Any = (args, kwargs)
    if name in INDEXING:  # of a device tensor, indices may be on the CPU
        if isinstance(args[0], Elsewhere):
            checked = (args[0], args[2:])
    elif name.startswith("_foreach") and func._overloadname == "Tensor":
        checked = (args[:-1], kwargs)  # the scalars are a CPU tensor
    tensors = [each for each in tree_leaves(checked) if isinstance(each, Tensor)]
    written = args[0] if name.endswith("_") and args else None
    for each in tensors:
        if isinstance(each, Elsewhere):
            continue
        if each.dim() > 0 or name in STRICT or each is written:
            other = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Elsewhere))
            text = f"{name.strip('_')} mixed a tensor on the device ({described(other)}) "
            text += f"with one on the CPU ({described(each)})"
            place = meter.place() if meter else None
            made = meter.made.get(storage(each)) if meter else None
            raise WrongDevice(Finding(text, place, None if made == place else made))


def check_generator(name: str, kwargs: dict, there: bool, meter: Any) -> None:
    generator = kwargs.get("generator")  # a new Python object of the same generator
    if generator is not None and there != (generator._cdata in DeviceGenerator.alive):
        sides = ("the device", "the CPU") if there else ("the CPU", "the device")
        text = f"{name.strip('_')} draws on {sides[0]} with a generator of {sides[1]}"
        raise WrongDevice(Finding(text, meter.place() if meter else None))


def described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"


# --- what Python sees -----------------------------------------------------------------------------


class DeviceFunctions(TorchFunctionMode):
    """Translates the device that Python sees, and counts what dispatch does not show."""

    inside = 0

    def __init__(self, meter: DeviceMeter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            func, args, kwargs = Tensor.to, (args[0], REAL), {}
        args, kwargs = self.translated(func, args, kwargs or {})
        first = args[0] if args else None
        if func is Tensor.pin_memory:
            return first
        name = sync_of_function(func, args, kwargs)
        waits = name is not None and isinstance(first, Elsewhere)
        if waits and name == "numpy":
            text = f"numpy() of a tensor on the device ({described(first)}); .cpu() comes first"
            raise WrongDevice(Finding(text, self.meter.place()))
        if name is not None and waits:
            self.meter.sync(name)
        if isinstance(first, Elsewhere) and waits and func is Tensor.tolist:
            return first.inner.tolist()
        DeviceFunctions.inside += 1
        self.meter.quiet += waits
        try:
            return func(*args, **kwargs)
        finally:
            self.meter.quiet -= waits
            DeviceFunctions.inside -= 1

    def translated(self, func: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args = tuple(real(each) for each in args) if func is Tensor.to else args
        args = tuple(real(each) if isinstance(each, torch.device) else each for each in args)
        return args, {**kwargs, "device": real(kwargs["device"])} if "device" in kwargs else kwargs


def real(device: Any) -> Any:
    """The device that torch knows, for the one that Python sees."""
    named = isinstance(device, str) and device.partition(":")[0] == CLAIMED.type
    seen = isinstance(device, torch.device) and device.type == CLAIMED.type
    return REAL if named or seen else device


def loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """torch.load, which knows the device too."""

    def load_here(file: Any, map_location: Any = None, *args: Any, **options: Any) -> Any:
        if real(map_location) != REAL:
            return load(file, map_location, *args, **options)
        found = load(file, "cpu", *args, **options)
        return tree_map_only(Tensor, lambda x: x.to(REAL), found)

    return load_here


PlainGenerator = torch.Generator


class AnyGenerator(type(PlainGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, PlainGenerator) if cls is Generator else type(value) is cls


class Generator(PlainGenerator, metaclass=AnyGenerator):  # type: ignore[misc,valid-type]
    """torch.Generator, which knows the device too."""

    def __new__(cls, device: Any = "cpu") -> Any:
        if real(torch.device(device)) != REAL:
            return PlainGenerator(device)
        generator = PlainGenerator.__new__(DeviceGenerator)
        DeviceGenerator.alive[generator._cdata] = generator
        return generator


class DeviceGenerator(Generator):
    alive: dict[int, Any] = {}
    device = property(lambda self: CLAIMED)


@contextmanager
def elsewhere(meter: DeviceMeter) -> Iterator[None]:
    """Make `CLAIMED` a device that works."""
    lift = getattr(torch._C, "_set_only_lift_cpu_tensors", None)
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # that there is no GPU
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        # module.to(device) keeps its parameters' identity, as on a GPU
        torch.__future__.set_swap_module_params_on_conversion(True)
        if lift is not None:  # torch.tensor(..., device=...) goes through dispatch
            stack.callback(lift, False)
            lift(True)
        stack.enter_context(eagerly())
        stack.callback(DeviceGenerator.alive.clear)
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "load", loading(torch.load)))
        for name, function in {
            "synchronize": lambda *args: meter.sync("synchronize"),
            "get_rng_state": lambda *args: torch.get_rng_state(),
            "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(DeviceFunctions(meter))
        stack.enter_context(DeviceOperations(meter))
        yield
