"""How far two right systems may lie apart by chance, and how often that looks like a fault.

In each of several generated worlds the reference runs with four seeds of training. Two runs of one
world differ by chance alone. Their difference for each user gives the spread that margins are made
of, widened where a seed moves all users at once; runs 0 and 1 against 2 and 3 are a verdict that
ought to be green.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from harness import system
from harness.candidate import Candidate, install

Z = 3.0  # standard errors
RUNS = 4  # in a world; the third and fourth stand for another right solution


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--worlds", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new world after them")


def main(args: argparse.Namespace) -> int:
    """Measure and write the fixture anew after each world."""
    install([system.REFERENCE, system.SRC])
    begin, worlds = time.monotonic(), []
    while len(worlds) < args.worlds and time.monotonic() - begin < 60 * args.minutes:
        worlds.append(world(len(worlds)))
        made = fixture(worlds)
        system.MARGINS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(made["false_alarms"]), flush=True)
    return 0


def world(number: int) -> list[dict[str, Any]]:
    """Figures of the runs in one world."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="kata-margins-") as name:
        folder = Path(name)
        for i in range(RUNS):
            # the cold start has one seed for items and training: another table draws otherwise
            job = system.make_job(folder, seed=number, user_buckets=256 + i)
            request = {"job": str(job.path), "seed": 100 * number + i, "device": "cpu"}
            out = folder / "lists.npz"
            cold = i % 2 == 0  # a verdict's cold start runs once
            Candidate().quality(**request, out=str(out), cold=str(job.cold) if cold else None)
            runs.append(system.judge(job, out, cold))
    return runs


def fixture(worlds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Spread, margins, and how many verdicts of right solutions would have been red."""
    spread = {}
    for name in system.FIGURES:
        gaps = []
        for runs in worlds:
            held = [run[name] for run in runs if name in run]
            gaps += [a - b for a, b in zip(held[::2], held[1::2], strict=True)]
        values = np.concatenate(gaps)
        spread[name] = round(float(np.nanstd(values)), 4)
    distances: dict[str, list[float]] = {name: [] for name in system.FIGURES}
    for runs in worlds:
        for name in system.FIGURES:
            mine, theirs = ([r[name] for r in runs[i : i + 2] if name in r] for i in (0, 2))
            values = np.concatenate([a - b for a, b in zip(mine, theirs, strict=True)])
            error = spread[name] / math.sqrt((~np.isnan(values)).sum())
            z = float(np.nanmean(values)) / error
            distances[name].append(round(z, 2))
    spread, distances, alarms = widened(spread, distances)
    low, high = clopper_pearson(alarms, len(worlds))
    return {
        "made_by": f"python -m reference_tests.integration margins --worlds {len(worlds)}",
        "date": date.today().isoformat(),
        "torch": version("torch").partition("+")[0],
        "python": platform.python_version(),
        "z": Z,
        "spread": spread,
        "reference": {
            name: round(float(np.mean([np.nanmean(r[name]) for w in worlds for r in w
                                       if name in r])), 4)
            for name in [*system.FIGURES, "popularity"]
        },
        "false_alarms": {
            "verdicts": len(worlds),
            "red": alarms,
            "interval_95": [round(low, 4), round(high, 4)],
            "standard_errors": distances,
        },
    }


def widened(
    spread: dict[str, float], distances: dict[str, list[float]]
) -> tuple[dict[str, float], dict[str, list[float]], int]:
    """The spread as the verdicts have it, where a seed moves all users at once.

    Users of one run are not independent then, and their spread alone is too small: it is multiplied
    by the root mean square of the distances, if that is above 1. Also the distances in these
    terms, and how many verdicts were red; either side could have been the learner.
    """
    scale = {n: max(1.0, math.sqrt(float(np.mean(np.square(z))))) for n, z in distances.items()}
    spread = {name: round(value * scale[name], 4) for name, value in spread.items()}
    distances = {name: [round(x / scale[name], 2) for x in z] for name, z in distances.items()}
    alarms = sum(any(abs(x) > Z for x in each) for each in zip(*distances.values(), strict=True))
    return spread, distances, alarms


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
