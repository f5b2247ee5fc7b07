"""The warm runner: a process that has imported torch and pytest, and forks a child for each run.

A run then starts in a tenth of a second instead of three. A child may crash, hang or flood like any
other (see runner.py): it has a session of its own, limits, and is killed as a group. The parent
never runs learner code and never uses a second thread: a fork with an OpenMP pool would hang.

    with Warm() as warm:
        result = warm.run(kata, ["reference"])
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from harness import events, runner, settings
from harness.catalog import Kata
from harness.paths import ROOT

# What katas import anyway; each costs between 0.1 s and 2 s.
USUAL = (
    *("torch", "numpy", "pytest", "torch.optim", "torch.testing", "torch._dynamo", "hypothesis"),
    *("harness.plugin", "harness.spec", "harness.diagnosis", "harness.probe"),
)


def available() -> bool:
    """Whether this system can fork."""
    return hasattr(os, "fork") and sys.platform != "darwin"  # macOS' own libraries forbid it


class Warm:
    """The parent of the children; to be closed, or used in a `with` statement.

    Args:
        preload: modules to import besides the usual ones; what is not installed is left out.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.warm", *USUAL, *preload],
            cwd=ROOT,
            env=runner.environment() | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us, and we tell it
        )

    def run(
        self,
        kata: Kata,
        impls: Sequence[str] = (),
        device: str | None = None,
        *,
        options: Sequence[str] = (),
        timeout: float | None = None,
        cwd: Path | None = None,
        transcript: bool = False,
        listen: Callable[[dict[str, Any]], None] | None = None,
    ) -> runner.KataResult:
        """Run a kata's tests, as `runner.run_kata` does in a fresh process.

        Args:
            options: of pytest.
            listen: is told each event (see events.py) when it happens.
            transcript: messages call the first folder of `impls` src, as the learner's own.
        """
        with tempfile.TemporaryDirectory(prefix="kata-") as folder:
            results = Path(folder) / "results.jsonl"
            results.touch()
            given = [*runner.arguments(kata, impls, device, cwd), *options]
            begin = time.monotonic()
            reason, output = self.call(
                "pytest:main",
                [given],
                results,
                timeout or kata.seconds,
                transcript=transcript,
                listen=listen,
            )
            result = runner.KataResult(kata, output=output, seconds=time.monotonic() - begin)
            runner.judge(result, events.read(results), reason)
            return result

    def call(
        self,
        function: str,
        arguments: Sequence[Any],
        results: Path,
        timeout: float,
        *,
        transcript: bool = False,
        listen: Callable[[dict[str, Any]], None] | None = None,
    ) -> tuple[str, str]:
        """Call "module:function" in a child; why it ended badly ("" if it did not), its output."""
        output = results.with_name("output.txt")
        request = {
            "function": function,
            "arguments": list(arguments),
            "results": str(results),
            "output": str(output),
            "timeout": timeout,
            "transcript": transcript,
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            if listen is not None:
                self.follow(results, listen)
            line = self.process.stdout.readline()
            if not line:
                raise BrokenPipeError
        except OSError:
            raise RuntimeError("the warm process has ended") from None
        reason = json.loads(line)
        text = output.read_text(encoding="utf-8", errors="replace") if output.is_file() else ""
        return reason, text

    def follow(self, results: Path, listen: Callable[[dict[str, Any]], None]) -> None:
        """Tell each event when it happens, until the child has ended."""
        told, ended = 0, False
        while not ended:
            ended = bool(select.select([self.process.stdout], [], [], 0.01)[0])
            for event in events.read(results)[told:]:
                listen(event)
                told += 1

    def close(self) -> None:
        """End the process; a child that still runs is killed."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# --- the process itself ---------------------------------------------------------------------------


def main(preload: Sequence[str]) -> None:
    """Import, then answer a request a line until the standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # nobody who prints may spoil the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in preload:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # the kata says what it lacks
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a child's collector does not touch, and so copy, what it shares with us
    while line := requests.readline():
        answer = serve(json.loads(line), requests)
        try:
            os.write(answers, json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:  # whoever asked was killed
            return


def serve(request: dict[str, Any], requests: Any) -> str:
    """Fork a child for one request and wait for it; why it ended badly, or ""."""
    pid = os.fork()
    if pid == 0:
        child(request)
    runner.limit(pid, "RLIMIT_FSIZE", runner.FILE_LIMIT)
    runner.limit(pid, "RLIMIT_AS", runner.MEMORY_LIMIT)
    output = Path(request["output"])
    until = time.monotonic() + request["timeout"]
    pause, reason, code = 0.001, "", None
    while code is None and not reason:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            reason = f"it took longer than {request['timeout']:g} s"
        elif output.is_file() and output.stat().st_size > runner.OUTPUT_LIMIT:
            reason = f"it printed more than {runner.OUTPUT_LIMIT >> 20} MB"
        else:
            time.sleep(pause)
            pause = min(pause * 1.2, 0.02)
    try:
        os.killpg(pid, signal.SIGKILL)  # what it left behind, too
    except (ProcessLookupError, PermissionError):
        pass
    if code is None:
        os.waitpid(pid, 0)
        return reason
    return reason or runner.ending(code)


def child(request: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ[events.RESULTS] = request["results"]
        settings.transcript = request["transcript"]
        module, _, function = request["function"].partition(":")
        code = int(getattr(importlib.import_module(module), function)(*request["arguments"]) or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        code = int(error.code) if isinstance(error, SystemExit) and error.code in (0, 1) else 70
    finally:
        os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
