"""How far two right systems may lie apart by chance, and how often that looks like a fault.

In each of several generated worlds the reference runs with four seeds of training. Two runs of one
world differ by chance alone. Their difference for each user gives the spread that margins are made
of, widened where a seed moves all users at once. Two runs against the other two are a verdict that
ought to be green, by the margins of worlds other than its own; there are three ways to pair four
runs, and what these give is uncorrelated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from harness import system
from harness.candidate import Candidate, install

Z = 3.5  # standard errors; at 3, 10 of 360 verdicts of right runs were red (2026-11-29)
RUNS = 4  # in a world; two stand for another right solution
PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
FOLDS = 5  # of the worlds; each is judged with the margins of the others


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worlds", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")


def main(args: argparse.Namespace) -> int:
    """Measure and write the fixture anew after each world."""
    worlds = []
    fresh = get_context("spawn")  # a fork of a process that has used torch can hang
    roots = [system.REFERENCE, system.SRC]
    with ProcessPoolExecutor(args.jobs, fresh, initializer=install, initargs=(roots,)) as pool:
        for runs in pool.map(world, range(args.worlds)):
            worlds.append(runs)
            made = fixture(worlds)
            system.MARGINS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            alarms = made["false_alarms"]
            print({key: alarms[key] for key in ("worlds", "red", "interval_95")}, flush=True)
    return 0


def world(number: int) -> list[dict[str, Any]]:
    """Figures of the runs in one world."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="kata-margins-") as name:
        folder = Path(name)
        for i in range(RUNS):
            job = system.make_job(folder, seed=number)
            request = {"job": str(job.path), "seed": 100 * number + i, "device": "cpu"}
            out = folder / "lists.npz"
            with other_draws(i):
                Candidate().quality(**request, out=str(out), cold=str(job.cold))
            runs.append(system.judge(job, out, cold=True))
    return runs


@contextmanager
def other_draws(count: int) -> Iterator[None]:
    """The cold start has one seed, of its items too: its factors begin from other vectors."""
    from recsys import pipeline

    plain = pipeline.choice_factors

    def factors(*args: Any) -> Any:
        torch.rand(count)
        return plain(*args)

    with mock.patch.object(pipeline, "choice_factors", factors):
        yield


def fixture(worlds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Spread, margins, and how many verdicts of right solutions would have been red.

    A verdict is counted with the spread of other worlds, as it is for a learner.
    """
    held_out: dict[str, list[float]] = {name: [] for name in system.FIGURES}
    folds = min(FOLDS, len(worlds)) if len(worlds) > 1 else 0
    for fold in range(folds):
        known = fitted([runs for i, runs in enumerate(worlds) if i % folds != fold])
        for name, found in distances(worlds[fold::folds], known).items():
            held_out[name] += [round(z, 2) for z in found]
    verdicts = list(zip(*held_out.values(), strict=True))
    # either side could have been the learner: counted is whichever is worse
    alarms = sum(any(abs(z) > Z for z in each) for each in verdicts)
    low, high = clopper_pearson(alarms, len(verdicts))
    return {
        "made_by": f"python -m reference_tests.integration margins --worlds {len(worlds)}",
        "date": date.today().isoformat(),
        "torch": version("torch").partition("+")[0],
        "python": platform.python_version(),
        "z": Z,
        "spread": {name: round(value, 4) for name, value in fitted(worlds).items()},
        "reference": {
            name: round(float(np.mean([np.nanmean(r[name]) for w in worlds for r in w])), 4)
            for name in [*system.FIGURES, "popularity"]
        },
        "false_alarms": {
            "worlds": len(worlds),
            "verdicts": len(verdicts),
            "folds": folds,
            "red": alarms,
            "interval_95": [round(low, 4), round(high, 4)],
            "standard_errors": held_out,
        },
    }


def fitted(worlds: list[list[dict[str, Any]]]) -> dict[str, float]:
    """The spread of each figure between two runs of one world, for a user.

    Users of one run are not independent where a seed moves all of them at once, and their spread
    alone is too small: it is multiplied by the root mean square of the distances, if that is
    above 1.
    """
    spread = {}
    for name in system.FIGURES:
        gaps = []
        for runs in worlds:
            held = [run[name] for run in runs]
            gaps += [a - b for a, b in zip(held[::2], held[1::2], strict=True)]
        spread[name] = float(np.nanstd(np.concatenate(gaps)))
    for name, found in distances(worlds, spread).items():
        spread[name] *= max(1.0, math.sqrt(float(np.mean(np.square(found)))))
    return spread


def distances(
    worlds: list[list[dict[str, Any]]], spread: dict[str, float]
) -> dict[str, list[float]]:
    """Two runs of each world against the other two, in standard errors."""
    found: dict[str, list[float]] = {name: [] for name in system.FIGURES}
    for runs in worlds:
        for (one, other), name in product(PAIRINGS, system.FIGURES):
            pairs = zip(one, other, strict=True)
            values = np.concatenate([runs[i][name] - runs[j][name] for i, j in pairs])
            error = spread[name] / math.sqrt((~np.isnan(values)).sum())
            found[name].append(float(np.nanmean(values)) / error)
    return found


def clopper_pearson(hits: int, runs: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson 1934), by bisection."""

    def tail(p: float, most: int) -> float:
        return sum(math.comb(runs, k) * p**k * (1 - p) ** (runs - k) for k in range(most + 1))

    def where(function: Any, wanted: float) -> float:  # falling in p
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if function(middle) > wanted else (low, middle)
        return low

    half = (1 - level) / 2
    low = 0.0 if hits == 0 else where(lambda p: tail(p, hits - 1), 1 - half)
    high = 1.0 if hits == runs else where(lambda p: tail(p, hits), half)
    return low, high
