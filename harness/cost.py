"""What a call costs, counted rather than timed: operations, memory, synchronisations.

    >>> import torch
    >>> x = torch.ones(4, 3)
    >>> cost = count(lambda: [(row * 2).sum().item() for row in x])
    >>> cost.operations, cost.views, cost.largest_bytes, cost.syncs
    (12, 1, 12, ['item', 'item', 'item', 'item'])

It works around autograd, optimizers and `no_grad`, and changes no result. It sees what Python hands
to the dispatcher: not the buffers that a kernel takes and gives back inside one operation, nor what
other threads do. Never around `torch.compile`d code, which would silently run eagerly: that is an
error.
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.message import is_learner_file, shown


class Place(NamedTuple):
    """A line of the learner's code."""

    file: str
    line: int
    function: str

    def facts(self, label: str = "in") -> list[tuple[str, str]]:
        """What a message shows of it."""
        source = linecache.getline(self.file, self.line).strip()
        return [(label, f"{shown(self.file)}:{self.line} {self.function}"), ("", source)]


class Made(NamedTuple):
    """A tensor that an operation made."""

    bytes: int
    operation: str
    shape: list[int]
    dtype: str
    place: Place | None


@dataclass
class Cost:
    """What one call did.

    Attributes:
        result: what the function returned.
        operations: dispatched aten operations that compute or move something, those of the
            backward pass and of optimizers too. A fused or foreach operation is one.
        views: the others (view, expand, select, detach, ...), which only look at a tensor anew.
        allocated_bytes: of all storages that were made, whether or not they lived on.
        largest_bytes: of the largest one; `largest` says which that was.
        syncs: what would make the host wait for an accelerator, by name (item, tolist, cpu,
            nonzero, boolean mask, ...), each time it happened. On the CPU every tensor is taken to
            stand for one on a device, so the checks that right code does on the CPU only are
            in it too, and those that torch's optimizers do on their step counters;
            `harness.devices` tells them apart.
        sync_places: the learner's line of each.
        by_place: operations and views by the learner's line.
    """

    result: Any = None
    operations: int = 0
    views: int = 0
    allocated_bytes: int = 0
    largest: Made | None = None
    syncs: list[str] = field(default_factory=list)
    sync_places: list[Place | None] = field(default_factory=list)
    by_place: Counter[Place | None] = field(default_factory=Counter)

    @property
    def largest_bytes(self) -> int:
        return self.largest.bytes if self.largest else 0


def count(function: Callable[[], Any]) -> Cost:
    """Run `function()` once and count what it does.

    Example:
        >>> weight = torch.ones(100, 8)
        >>> cost = count(lambda: (weight[:, None] - weight).square().sum(2))
        >>> cost.largest_bytes == 100 * 100 * 8 * 4, cost.largest.operation
        (True, 'sub')
    """
    meter = Meter()
    with meter.running(), eagerly() as compiled:
        meter.cost.result = function()
    if compiled:
        raise RuntimeError(
            "torch.compile'd code cannot be counted: under a dispatch mode it runs eagerly; "
            "count the function that was compiled, and use dynamo's counters for the graphs"
        )
    return meter.cost


@contextmanager
def eagerly() -> Iterator[list[Any]]:
    """Run compiled code eagerly; gives a list that is not empty once there was some."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    install: Any = getattr(dynamo, "_maybe_set_eval_frame", None)
    seen: list[Any] = []

    def not_compiling(callback: Any, *args: Any, **kwargs: Any) -> Any:
        if callable(callback):
            seen.append(callback)
            callback = None
        return install(callback, *args, **kwargs)

    with ExitStack() as stack:
        if install is not None:
            stack.enter_context(mock.patch.object(dynamo, "_maybe_set_eval_frame", not_compiling))
        yield seen


# --- how ------------------------------------------------------------------------------------------


class Meter:
    """Adds up a `Cost` while its two modes run.

    A subclass says which tensors count as being on a device: of others nothing is waited for.
    """

    def __init__(self) -> None:
        self.cost = Cost()
        self.quiet = 0  # inside a call that is recorded already
        self._learner: dict[str, bool] = {}

    def on_device(self, value: Any) -> bool:
        return isinstance(value, Tensor)

    def running(self) -> ExitStack:
        """Both modes: `tolist` and `.cpu()` are invisible to dispatch."""
        stack = ExitStack()
        stack.enter_context(_Functions(self))
        stack.enter_context(_Operations(self))
        return stack

    def place(self) -> Place | None:
        """The innermost line of the learner's, the provided data package apart."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            file = frame.f_code.co_filename
            if file not in self._learner:
                self._learner[file] = is_learner_file(file) and "/recsys/data/" not in file
            if self._learner[file]:
                return Place(file, frame.f_lineno, function_name(frame))
            frame = frame.f_back
        return None

    def sync(self, name: str) -> None:
        if not self.quiet:
            self.cost.syncs.append(name)
            self.cost.sync_places.append(self.place())

    def saw(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """One dispatched operation."""
        if func.namespace in ("profiler", "prim"):  # an optimizer's label, x.device
            return
        name = func._schema.name.rpartition("::")[2]
        place = self.place()
        cost = self.cost
        cost.by_place[place] += 1
        if is_view(func):
            cost.views += 1
            return
        cost.operations += 1
        given = {storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and storage(each) not in given:
                given.add(storage(each))
                size = bytes_of(each)
                cost.allocated_bytes += size
                if size > cost.largest_bytes:
                    dtype = str(each.dtype).removeprefix("torch.")
                    cost.largest = Made(size, name, list(each.shape), dtype, place)
        waits = sync_of_operation(name, func, args, kwargs, out, self.on_device)
        if waits:
            self.sync(waits)


def function_name(frame: FrameType) -> str:
    """The function that a frame is of; for a comprehension or a lambda the one it is written in."""
    outer: FrameType | None = frame
    while outer is not None and outer.f_code.co_filename == frame.f_code.co_filename:
        if not outer.f_code.co_name.startswith("<"):
            return outer.f_code.co_name
        outer = outer.f_back
    return frame.f_code.co_name


class _Operations(TorchDispatchMode):
    _should_skip_dynamo = classmethod(lambda cls: False)  # which costs a second to import

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.meter.saw(func, args, kwargs or {}, out)
        return out


class _Functions(TorchFunctionMode):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = sync_of_function(func, args, kwargs)
        if not name or not args or not self.meter.on_device(args[0]):
            return func(*args, **kwargs)
        self.meter.sync(name)
        self.meter.quiet += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.meter.quiet -= 1


# functions of Python that wait, and their names; what dispatch shows well enough is not here
SYNC_FUNCTIONS = {
    Tensor.tolist: "tolist",
    Tensor.cpu: "cpu",
    Tensor.numpy: "numpy",
    Tensor.__array__: "numpy",
    Tensor.item: "item",
    Tensor.__bool__: "bool",
    Tensor.is_nonzero: "bool",
    Tensor.__int__: "int",
    Tensor.__float__: "float",
    Tensor.__complex__: "complex",
    Tensor.__index__: "index",
    Tensor.__contains__: "in",
    Tensor.__format__: "format",
    Tensor.__repr__: "repr",
}
SYNC_OPERATIONS = {
    "_local_scalar_dense": "item",
    "is_nonzero": "bool",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "unique_dim_consecutive": "unique",
    "equal": "equal",
    "allclose": "allclose",
    "bincount": "bincount",
}
METADATA = {"_unsafe_view", "_reshape_alias", "is_same_size"}  # no view by its schema


def sync_of_function(func: Any, args: tuple, kwargs: dict) -> str | None:
    """The name of a synchronisation among the functions, or None."""
    try:
        name = SYNC_FUNCTIONS.get(func)
    except TypeError:  # not hashable
        return None
    if name is None and func is Tensor.to and not kwargs.get("non_blocking"):
        target = kwargs.get("device", args[1] if len(args) > 1 else None)
        # a torch.device may be the device of the run, and an honest `.to(device)`
        name = "to" if isinstance(target, str) and target.partition(":")[0] == "cpu" else None
    return name


def sync_of_operation(
    name: str, func: Any, args: tuple, kwargs: dict, out: Any, on_device: Callable[[Any], bool]
) -> str | None:
    """The name of a synchronisation among the dispatched operations, or None."""
    given = tree_leaves(args)
    if name in ("_to_copy", "copy_"):
        target, source = (args[0], args[1]) if name == "copy_" else (out, args[0])
        leaves = on_device(source) and source.device.type != "cpu" and target.device.type == "cpu"
        later = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        return "to" if leaves and not later else None
    if not any(on_device(each) for each in given):
        return None
    if name == "repeat_interleave":
        sized = kwargs.get("output_size") is not None
        return None if sized or func._overloadname != "Tensor" else "repeat_interleave"
    if name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        filled = "put" in name and args[2].numel() == 1  # the same as masked_fill
        return "boolean mask" if masks and not filled else None
    return SYNC_OPERATIONS.get(name)


_views: dict[Any, bool] = {}


def is_view(func: Any) -> bool:
    """Whether an operation only looks at its input anew."""
    if func not in _views:
        aliases = [each.alias_info for each in func._schema.returns]
        _views[func] = (
            any(alias is not None and not alias.is_write for alias in aliases)
            or func._schema.name.rpartition("::")[2] in METADATA
        )
    return _views[func]


def storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse
        return id(tensor)


def bytes_of(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else ()
        return sum(part.untyped_storage().nbytes() for part in parts)
