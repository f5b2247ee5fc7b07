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
from types import FunctionType, ModuleType
from typing import Any

from harness.message import is_learner_file

TOOLS = (
    *("harness.spec", "harness.events", "harness.probe", "harness.diagnosis", "harness.plugin"),
    *("_pytest.runner", "_pytest.outcomes"),
)
METHODS = (("_pytest.python", "Function", "runtest"), ("_pytest.reports", "TestReport", "__init__"))
GRACE = 0.5  # seconds that a thread has to end


class Guard:
    """Remembers how things are before a rung; `broken` says what is not so after it."""

    def __init__(self) -> None:
        self.tools = list(tools())
        self.settings = {name: read() for name, (read, _) in settings().items()}
        self.threads = set(learner_threads())

    def broken(self) -> list[tuple[str, str]]:
        """(what came back, what was expected) for each change; all but threads are put back."""
        found = []
        for owner, name, value in self.tools:
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)
                where = f"{owner.__name__}.{name}"
                found.append((f"{where} was replaced", "test tools that stay as they are"))
        for name, (read, write) in settings().items():
            before, now = self.settings.get(name), read()
            if name in self.settings and now != before:
                write(before)
                found.append((f"{name} is {now} after the rung", f"{before}, as before"))
        until = time.monotonic() + GRACE
        while (left := set(learner_threads()) - self.threads) and time.monotonic() < until:
            time.sleep(0.01)
        if left:
            names = ", ".join(sorted(thread.name for thread in left))
            found.append((f"left running: {names}", "no thread of yours after the rung"))
        return found


def tools() -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, value) of the functions that judge."""
    for module in filter(None, map(sys.modules.get, TOOLS)):
        for name, value in list(vars(module).items()):
            if isinstance(value, (FunctionType, type, ModuleType)):
                yield module, name, value
    for module_name, owner, name in METHODS:
        holder = getattr(sys.modules.get(module_name), owner, None)
        if holder is not None:
            yield holder, name, vars(holder)[name]


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
