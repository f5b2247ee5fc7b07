"""`kata test`: each kata in a child process of its own, which may crash, hang or flood.

The child is pytest in a new session; it is killed as a group. What its tests did comes back as
JSON lines (see plugin.py), so a kata without a result for each rung is red, with the reason.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import catalog, events, message, overlay, record
from harness.catalog import Kata
from harness.diagnosis import Diagnosis
from harness.errors import UsageError
from harness.paths import ROOT

OUTPUT_LIMIT = 1 << 20  # bytes
MEMORY_LIMIT = 6 << 30  # bytes of address space, on the CPU only
FILE_LIMIT = 64 << 20  # bytes of one file: pytest captures what a test prints in one

SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "80",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # others' plugins: a tenth of a second, for nothing
}


@dataclass
class KataResult:
    """How one run of a kata went."""

    kata: Kata
    rungs: dict[str, str] = field(default_factory=dict)  # rung -> "passed" or "failed", all of them
    reds: list[message.Red] = field(default_factory=list)
    reason: str = ""  # why rungs have no result
    diagnosis: Diagnosis = field(default_factory=Diagnosis)
    output: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> int:
        return sum(outcome == "passed" for outcome in self.rungs.values())

    @property
    def ok(self) -> bool:
        return not self.reason and not self.reds and self.passed == len(self.kata.rungs) > 0


def run_kata(
    kata: Kata,
    impls: Sequence[str] = (),
    device: str | None = None,
    timeout: float | None = None,
    *,
    cwd: Path | None = None,
    listen: Callable[[dict[str, Any]], None] | None = None,
) -> KataResult:
    """Run a kata's tests in a fresh process. Nothing that they do is an error here.

    `listen` is told the events (see events.py), though only when all is over.
    """
    with tempfile.TemporaryDirectory(prefix="kata-") as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        command = [sys.executable, "-m", "pytest", *arguments(kata, impls, device, cwd)]
        begin = time.monotonic()
        child = Child(command, results, memory=device in (None, "cpu"))
        reason = child.wait(timeout or kata.seconds)
        result = KataResult(kata, output=child.output(), seconds=time.monotonic() - begin)
        judge(result, events.read(results), reason)
    return result


def arguments(
    kata: Kata, impls: Sequence[str], device: str | None = None, cwd: Path | None = None
) -> list[str]:
    """What pytest is called with."""
    given = [str(kata.folder), "-q", "-c", "tox.ini"]
    for impl in impls:
        named = impl in ("mine", "reference")
        given.append(f"--impl={impl if named else (cwd or Path.cwd()) / impl}")
    return given + (["--device", device] if device else [])


def environment() -> dict[str, str]:
    """What a child that runs specs finds in its environment."""
    env = {k: v for k, v in os.environ.items() if k not in ("KATA_IMPL", "PYTEST_ADDOPTS")}
    return env | SETTINGS


class Child:
    """A process in a session of its own, whose output is read and counted.

    Args:
        memory: whether its address space is limited. env: instead of this process's.
    """

    def __init__(
        self,
        command: list[str],
        results: Path,
        *,
        memory: bool,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> None:
        env = (environment() if env is None else env | SETTINGS) | {events.RESULTS: str(results)}
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.chunks: list[bytes] = []
        self.flooded = False
        limit(self.process.pid, "RLIMIT_FSIZE", FILE_LIMIT)
        if memory:
            limit(self.process.pid, "RLIMIT_AS", MEMORY_LIMIT)
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        size = 0
        assert self.process.stdout is not None
        while chunk := os.read(self.process.stdout.fileno(), 1 << 16):
            size += len(chunk)
            if size > OUTPUT_LIMIT:
                self.flooded = True
                self.kill()
                return
            self.chunks.append(chunk)

    def wait(self, timeout: float) -> str:
        """Wait for the end, and end what it left behind; the reason if that was no proper one."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"it took longer than {timeout:g} s"
        except BaseException:  # Ctrl-C: leave nothing running
            self.kill()
            raise
        finally:
            self.kill()
            self.process.wait()
            self.reader.join(5)
        if self.flooded:
            return f"it printed more than {OUTPUT_LIMIT >> 20} MB"
        return ending(code)

    def kill(self) -> None:
        """The whole group, whatever of it is left."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass

    def output(self) -> str:
        return b"".join(self.chunks).decode("utf-8", "replace")


def limit(pid: int, name: str, most: int) -> None:
    """Limit a resource of another process, where the system can do that."""
    try:
        import resource

        resource.prlimit(pid, getattr(resource, name), (most, most))
    except (ImportError, AttributeError, OSError, ValueError):
        pass


def ending(code: int) -> str:
    """Why a child's exit code means that it has no proper result, or ""."""
    if code < 0:
        return f"the process was killed by {signal_name(-code)}"
    return "" if code in (0, 1) else f"pytest ended with exit code {code}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def judge(result: KataResult, lines: list[dict[str, Any]], reason: str) -> None:
    """From the events to a result for each rung; a rung without one is red."""
    outcomes: dict[str, set[str]] = {}
    running = ""
    for line in lines:
        if line["event"] == "start":
            running = line["nodeid"].partition("::")[2]
        elif line["event"] == "diagnosis":
            result.diagnosis = Diagnosis(**{k: line[k] for k in ("ids", "exact", "facts")})
        elif line["event"] in ("setup", "call", "teardown"):
            # a rung has passed when all its cases were called and passed
            if line["event"] == "call" or line["outcome"] != "passed":
                outcomes.setdefault(line["rung"], set()).add(line["outcome"])
            if line["facts"]:
                result.reds.append(message.Red(**{k: line[k] for k in message.FIELDS}))
            running = "" if line["event"] == "teardown" else running
    finished = any(line["event"] == "finish" for line in lines)
    names = [rung.name for rung in result.kata.rungs]
    missing = [name for name in names if name not in outcomes]
    others = [name for name in outcomes if name not in names and "failed" in outcomes[name]]
    for name in [*names, *others]:
        result.rungs[name] = "passed" if outcomes.get(name) == {"passed"} else "failed"
    if reason:
        result.reason = reason + (f", in {running}" if running else "")
    elif not names:
        result.reason = "it has no rungs yet"
    elif not finished:
        result.reason = "the process ended early" + (f", in {running}" if running else "")
    elif missing:
        result.reason = f"no result for {', '.join(missing)}"
    result.reds.sort(key=lambda red: red.order)
    for red in result.reds[:1]:
        red.facts += result.diagnosis.facts


@contextmanager
def runs(*, cold: bool = False) -> Iterator[Callable[..., KataResult]]:
    """How several katas are run: in forks of a warm process, or, if `cold`, in fresh ones."""
    from harness import warm

    if cold or not warm.available():
        yield run_kata
        return
    with warm.Warm() as process:
        yield process.run


def tell(result: KataResult) -> None:
    """A line for a kata, and why it has no result if it has none."""
    state = "passing" if result.ok else "red"
    line = f"{result.kata.id:<24} {state:<8} {result.passed}/{len(result.rungs)} rungs"
    print(f"{line}  {result.seconds:.1f} s", flush=True)
    if result.reason:
        print(f"  no result: {result.reason}")
        if not result.reds:
            print("".join(f"  | {text}\n" for text in result.output.splitlines()[-8:]), end="")


def keep(result: KataResult, digest: str) -> None:
    """Record the result; where that cannot be written, it was at least told."""
    try:
        record.write(
            result.kata, result.rungs,
            digest=digest, reason=result.reason, seconds=result.seconds,
        )  # fmt: skip
    except OSError as error:
        print(f"kata: not recorded: {error.filename}: {error.strerror}", file=sys.stderr)


def main(args: argparse.Namespace) -> int:
    """`kata test [NN ...] [--impl ...]`: run katas isolated, and record the learner's own."""
    katas = catalog.load()
    chosen = [catalog.find(name, katas) for name in args.katas] or katas
    if not chosen:
        raise UsageError("there are no katas yet: katas/ has no kata.toml")
    impls = args.impl or []
    overlay.resolve(impls, Path.cwd())  # a wrong path is said once, before anything runs
    reds: list[message.Red] = []
    good = True
    with runs(cold=len(chosen) == 1 or args.device != "cpu") as run:
        for kata in chosen:
            digest = record.digest_of(kata)
            result = run(kata, impls, args.device)
            tell(result)
            if not impls:
                keep(result, digest)
            reds += result.reds
            good = good and result.ok
    if reds:
        print()
        print("\n".join(message.screen(reds[0], reds[1:])))
    return 0 if good else 1
