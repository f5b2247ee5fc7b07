"""`kata watch [NN]`: the verdict on each save, from a warm process.

The first red rung is shown as soon as it is red; how many more there are, when the run has ended.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import board, catalog, message, record, runner, warm
from harness.catalog import Kata
from harness.paths import FIXTURES, SRC

KEYS = "n next  h hint  g guide  r review  s solution  Enter again  q quit"
PAUSE = 0.1  # seconds between two looks, where the system tells nothing


def main(args: argparse.Namespace) -> int:
    """Watch one kata's files, or the next one's, until q, Ctrl-C or the end of the input."""
    katas = catalog.load()
    kata = catalog.find(args.kata, katas) if args.kata else next_kata(katas)
    if kata is None:
        print("All katas pass. Watch one of them: kata watch NN")
        return 0
    happened: queue.Queue[str] = queue.Queue()
    cold = args.cold or not warm.available()
    if cold:
        print("Each verdict takes a fresh process: torch is imported anew for each.")
    with runner.runs(cold=cold) as run, keys(happened):
        watcher = Watcher(happened, poll=args.poll)
        while kata is not None:
            watcher.look_at(kata)
            kata = session(kata, run, happened)
    return 0


def next_kata(katas: list[Kata], after: Kata | None = None) -> Kata | None:
    """The first kata that is not passing (after one, if it is given)."""
    results = record.read()
    begun = katas.index(after) + 1 if after else 0
    standings = [board.standing(each, results.get(each.id)) for each in katas[begun:]]
    return next((each.kata for each in standings if each.state != "passing"), None)


def session(kata: Kata, run: Runner, happened: queue.Queue[str]) -> Kata | None:
    """One kata: a verdict now and on each save; returns the kata to go on with, if any."""
    verdict(kata, run)
    while True:
        what = happened.get()
        while what == "saved" and not happened.empty():  # several files at once
            what = happened.get()
        if what in ("saved", "\n", "\r"):
            verdict(kata, run)
        elif what == "n":
            return next_kata(catalog.load(), after=kata) or kata
        elif what in ("q", "\x03", "\x04", "end"):
            return None
        elif what in COMMANDS:
            from harness import cli

            cli.main([COMMANDS[what], kata.number])


COMMANDS = {"h": "hint", "g": "guide", "r": "review", "s": "solution"}
Runner = Callable[..., runner.KataResult]


def verdict(kata: Kata, run: Runner) -> None:
    """Run the kata, say what came of it, and record it."""
    begin = time.monotonic()
    if sys.stdout.isatty():
        print("\033[2J\033[H", end="")
    shown: list[message.Red] = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("facts") and not shown and event["event"] != "diagnosis":
            shown.append(message.Red(**{key: event[key] for key in message.FIELDS}))
            print("\n".join(begun(shown[0])), flush=True)

    digest = record.digest_of(kata)
    result = run(kata, listen=listen)
    record.write(kata, result.rungs, digest=digest, reason=result.reason, seconds=result.seconds)
    for line in summary(kata, result, shown, time.monotonic() - begin):
        print(line)
    print(KEYS if sys.stdin.isatty() else "", flush=True)


def begun(red: message.Red) -> list[str]:
    """The first red rung, while the others run. What comes next is a save: that needs no line."""
    return message.screen(replace(red, next=""))[:-1]


def summary(
    kata: Kata, result: runner.KataResult, shown: list[message.Red], seconds: float
) -> list[str]:
    """What is added to the first red rung: the diagnosis, the other rungs, how many pass."""
    lines: list[str] = []
    if result.reds:
        if not shown:
            lines += begun(result.reds[0])
        else:
            for label, text in result.diagnosis.facts:
                lines += message.fact(label, text, message.WIDTH)
        rest = message.collapsed(result.reds[0], result.reds[1:])
        lines += ["", *(message.clip(line, message.WIDTH) for line in rest)]
    if result.reason:
        lines.append(f"no result: {result.reason}")
    if result.ok:
        lines.append("next: r for a review of what you wrote, then n for the next kata")
    state = "passes" if result.ok else "is red"
    lines.append(
        f"{kata.id} {state}: {result.passed} of {len(result.rungs)} rungs, {seconds:.2f} s, "
        f"{time.strftime('%H:%M:%S')}"
    )
    return lines


# --- what happens ---------------------------------------------------------------------------------


@contextmanager
def keys(happened: queue.Queue[str]) -> Iterator[None]:
    """Put each key into the queue, without waiting for Enter where there is a terminal."""
    with cbreak() if sys.stdin.isatty() else nullcontext():

        def read() -> None:
            while letter := sys.stdin.read(1):
                happened.put(letter)
            if sys.stdin.isatty():
                happened.put("end")

        threading.Thread(target=read, daemon=True).start()
        yield


@contextmanager
def cbreak() -> Iterator[None]:
    """The terminal gives keys one by one; as before at the end, whatever happens."""
    try:
        import termios
        import tty
    except ImportError:  # Windows: keys come with Enter
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Watcher:
    """Puts "saved" into the queue when a file that a kata depends on has another content.

    Args:
        poll: look again and again instead of waiting for the system to tell, which network folders
            and some containers never do.
    """

    def __init__(self, happened: queue.Queue[str], *, poll: bool) -> None:
        self.happened = happened
        self.poll = poll or bool(os.environ.get("WATCHFILES_FORCE_POLLING"))
        self.stop = threading.Event()

    def look_at(self, kata: Kata) -> None:
        """Watch this kata from now on, and no other."""
        self.stop.set()
        self.stop = threading.Event()
        follow = polled if self.poll else told
        arguments = (kata, self.stop, lambda: self.happened.put("saved"))
        threading.Thread(target=follow, args=arguments, daemon=True).start()


def places(kata: Kata) -> list[Path]:
    """The folders whose files a kata's verdict depends on."""
    folders = (SRC / "recsys", kata.folder, FIXTURES / kata.id)
    return [folder for folder in folders if folder.is_dir()]


def contents(kata: Kata) -> str:
    """Changes exactly when a verdict may change."""
    return record.digest_of(kata)


def told(kata: Kata, stop: threading.Event, saved: Callable[[], None]) -> None:
    """Wait for the system's word of a change."""
    try:
        import watchfiles
    except ImportError:
        return polled(kata, stop, saved)
    before = contents(kata)
    options: dict[str, Any] = {"step": 5, "debounce": 20, "rust_timeout": 500}
    options |= {"yield_on_timeout": True, "raise_interrupt": False, "stop_event": stop}
    for _ in watchfiles.watch(*places(kata), **options):
        now = contents(kata)
        if now != before:
            before = now
            saved()


def polled(kata: Kata, stop: threading.Event, saved: Callable[[], None]) -> None:
    """Look at the files again and again."""
    before = contents(kata)
    while not stop.wait(PAUSE):
        now = contents(kata)
        if now != before:
            before = now
            saved()
