"""Progress on the terminal and curves for TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path


class Reporter:
    """Says what a run is doing, and keeps its curves.

    On a terminal a line is rewritten in place; elsewhere one line a stage is printed, and one
    every ten seconds within it, so that a log stays readable.

    Args:
        folder: where the TensorBoard event file goes.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))
        self.live = sys.stderr.isatty()
        self.name = ""
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finish()
        self.writer.close()

    def stage(self, name: str) -> None:
        """A new part of the run begins."""
        self._finish()
        self.name, self.started = name, time.monotonic()
        self._line("", always=True)

    def log(self, stage: str, tag: str, value: float, step: int) -> None:
        """A point of a curve; opens the stage if it is a new one."""
        if stage != self.name:
            self.stage(stage)
        self.writer.add_scalar(f"{stage}/{tag}".replace(" ", "_"), value, step)
        self._line(f"epoch {step}  {tag} {value:.4f}")

    def download(self, what: str, done: int, total: int | None) -> None:
        """Bytes of something fetched so far, of how many if that is known."""
        of = f" of {total / 2**20:.1f}" if total else ""
        self._line(f"{what} {done / 2**20:.1f}{of} MiB")

    def _line(self, text: str, always: bool = False) -> None:
        now = time.monotonic()
        line = f"{self.name}: {text}" if text else f"{self.name} ..."
        if self.live:
            print(f"\r\033[K{line[:79]}", end="", file=sys.stderr, flush=True)
        elif always or now - self.printed > 10:
            print(line, file=sys.stderr, flush=True)
            self.printed = now

    def _finish(self) -> None:
        if self.name and self.live:
            seconds = time.monotonic() - self.started
            print(f"\r\033[K{self.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        self.name = ""
