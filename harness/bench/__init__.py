"""`kata bench`: how fast and how good things are, measured side by side in one run.

`kata bench NN` runs a kata's timings (tests marked `benchmark`); each of the others has a file here
that is called like its option.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import catalog, overlay
from harness.errors import UsageError
from harness.paths import ROOT

OPTIONS = ("loop", "peers", "tune", "ablate", "ratings", "cold", "speed")


def main(args: argparse.Namespace) -> int:
    """Run what is asked for."""
    if args.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, not {args.rounds}")
    for option in OPTIONS:
        if getattr(args, option) not in (False, None):  # --speed without parts is []
            return int(importlib.import_module(f"harness.bench.{option}").main(args))
    if not args.katas:
        raise UsageError(
            f"kata bench: which? NN of a kata, {', '.join(f'--{o}' for o in OPTIONS[:-1])} "
            f"or --{OPTIONS[-1]}"
        )
    folders = [str(catalog.find(name).folder) for name in args.katas]
    command = [sys.executable, "-m", "pytest", *folders, "-m", "benchmark", "-s"]
    command += [f"--impl={impl}" for impl in args.impl or ["mine"]]
    return 1 if subprocess.run(command, cwd=ROOT).returncode else 0


def load(args: argparse.Namespace) -> Any:
    """The data set of `--data`, with the code of `--impl` in force from now on.

    Raises:
        UsageError: no such data set.
    """
    overlay.install(overlay.resolve(args.impl or ["mine"], Path.cwd()))
    return dataset(args.data)


def dataset(name: str) -> Any:
    """A data set by name or path, read by the code that is in force.

    Raises:
        UsageError: no such data set.
    """
    from recsys.data.errors import DataError
    from recsys.data.load import load as load_data

    try:
        return load_data(name, seed=0)
    except DataError as error:
        raise UsageError(str(error)) from None


def installed(package: str) -> str | None:
    """The version of a peer's package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def say(text: str) -> None:
    """How far it is, with the time: what takes hours is watched."""
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)
