"""Progress on the terminal, and curves for TensorBoard or Weights & Biases."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UsageError


class Reporter:
    """Says what a run is doing, and keeps its curves.

    On a terminal a line is rewritten in place; elsewhere one line a stage is printed, and one
    every ten seconds within it, so that a log stays readable.

    Args:
        folder: where the TensorBoard event file goes.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(str(folder))
        self.wandb: Any = None
        self.known: set[str] = set()  # stages that wandb was told of
        self.live = sys.stderr.isatty()
        self.name = ""
        self.started = self.printed = time.monotonic()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._finish()
        self.writer.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(exc[0] is not None))

    def track(self, config: Mapping[str, Any], name: str) -> None:
        """Send the curves to Weights & Biases too, if `tracking` in the configuration says wandb.

        Its own variables say how: WANDB_MODE=offline, WANDB_PROJECT, ...

        Raises:
            UsageError: another value, or the package is not installed.
        """
        where = config.get("tracking", "tensorboard")
        if where not in ("tensorboard", "wandb"):
            raise UsageError(f"tracking must be tensorboard or wandb, not {where!r}")
        if where == "tensorboard":
            return
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "tracking: wandb needs the package: "
                ".venv/bin/pip install -c constraints.txt wandb"
            ) from None
        project = os.environ.get("WANDB_PROJECT", "recsys-katas")
        self.wandb = wandb.init(
            project=project, name=name, dir=str(self.folder), config=dict(config)
        )

    def stage(self, name: str) -> None:
        """A new part of the run begins."""
        self._finish()
        self.name, self.started = name, time.monotonic()
        self._line("", always=True)

    def log(self, stage: str, tag: str, value: float, step: int) -> None:
        """A point of a curve; opens the stage if it is a new one."""
        if stage != self.name:
            self.stage(stage)
        curve = stage.replace(" ", "_")
        self.writer.add_scalar(f"{curve}/{tag}", value, step)
        if self.wandb is not None:
            if curve not in self.known:  # each counts its own epochs
                self.known.add(curve)
                self.wandb.define_metric(f"{curve}/*", step_metric=f"{curve}/epoch")
            self.wandb.log({f"{curve}/{tag}": value, f"{curve}/epoch": step})
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
