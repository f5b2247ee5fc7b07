"""What a rung finds it leaves: torch's settings, the test tools themselves, no thread of its own.

Learner code shares the process with the spec. Code that changes a default, or replaces a function
that judges it, would make other rungs green or red for no reason of theirs; it is put back and the
rung is red. Against `os._exit`, crashes and loops see runner.py.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, ModuleType
from typing import Any

from harness.message import is_learner_file

TOOLS = (
    *("harness.spec", "harness.events", "harness.probe", "harness.diagnosis", "harness.plugin"),
    *("harness.guard", "_pytest.runner", "_pytest.outcomes", "builtins", "math"),
    *("torch", "torch.autograd", "torch.nn.functional", "torch.testing"),
)
CLASSES = (
    *(("_pytest.python", "Function"), ("_pytest.reports", "TestReport")),
    *(("harness.guard", "Guard"), ("torch", "Tensor")),
)
GRACE = 0.5  # seconds that a thread has to end


class Guard:
    """Remembers how things are before a rung; `broken` says what is not so after it."""

    def __init__(self) -> None:
        self.tools = [(owner, dict(vars(owner))) for owner in tools()]
        self.settings = {name: read() for name, (read, _) in settings().items()}
        self.threads = set(learner_threads())

    def broken(self) -> list[tuple[str, str]]:
        """(what came back, what was expected) for each change; all but threads are put back."""
        found = []
        for owner, before in self.tools:
            for name in replaced(owner, before):
                if name in before:
                    setattr(owner, name, before[name])
                else:
                    delattr(owner, name)
                where = f"{owner.__name__}.{name}"
                found.append((f"{where} was replaced", "test tools that stay as they are"))
        for name, (read, write) in settings().items():
            was, now = self.settings.get(name), read()
            if name in self.settings and now != was:
                write(was)
                found.append((f"{name} is {now} after the rung", f"{was}, as before"))
        until = time.monotonic() + GRACE
        while (left := set(learner_threads()) - self.threads) and time.monotonic() < until:
            time.sleep(0.01)
        if left:
            names = ", ".join(sorted(thread.name for thread in left))
            found.append((f"left running: {names}", "no thread of yours after the rung"))
        return found


def tools() -> Iterator[Any]:
    """The modules and classes, with those they inherit from, whose functions judge."""
    yield from filter(None, map(sys.modules.get, TOOLS))
    for module, name in CLASSES:
        yield from getattr(sys.modules.get(module), name, object).__mro__[:-1]


def replaced(owner: Any, before: dict[str, Any]) -> list[str]:
    """Names of functions and modules that are others now, or hide one that was inherited."""
    now = dict(vars(owner))
    kinds: Any = (Callable, property, ModuleType)
    if owner is sys.modules.get("torch"):  # compiling replaces functions of torch written in Python
        kinds = BuiltinFunctionType
    changed = [name for name, value in before.items()
               if now.get(name) is not value and isinstance(value, kinds)]  # fmt: skip
    bases = owner.__mro__[1:] if isinstance(owner, type) else ()
    return changed + [name for name in now.keys() - before.keys()
                      if any(name in vars(base) for base in bases)]  # fmt: skip


def settings() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """What belongs to the whole process: how it is read, and how it is put back."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "the current folder": (os.getcwd, os.chdir)
    }
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_grad_enabled"):
        found |= {
            "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
            "torch's default device": (torch.get_default_device, torch.set_default_device),
            "torch.is_grad_enabled()": (torch.is_grad_enabled, torch.set_grad_enabled),
            "torch.is_inference_mode_enabled()": (
                torch.is_inference_mode_enabled,
                lambda value: None,
            ),
        }
    return found


def learner_threads() -> list[threading.Thread]:
    """Threads that run a learner's function."""
    if threading.active_count() == 1:
        return []
    return [thread for thread in threading.enumerate() if runs_learner_code(thread)]


def runs_learner_code(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    target = getattr(target, "func", target)  # of a functools.partial
    code = getattr(target, "__code__", None)
    return type(thread).__module__.startswith("recsys.") or (
        code is not None and is_learner_file(code.co_filename)
    )
