"""Growth: seconds and memory of the parts of a run when the data grow fourfold and sixteenfold.

The synthetic generator makes the data; one of users, items and rows a user grows at a time. What
grows with a power p of its size takes 4 ** p times as long at each step. Each point runs in a
process of its own, since the largest memory of a process never falls.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from harness.bench.speed import REPEATS, table
from harness.paths import ROOT

SIZES = {"users": 400, "items": 400, "rows a user": 8}
FACTORS = (1, 4, 16)
PARTS = ("training epoch", "full ranking", "candidate features")


def measure(args: argparse.Namespace) -> list[str]:
    """A line for each part of a run and what grows."""
    rows = []
    for grows in SIZES:
        points = []
        for factor in FACTORS:
            sizes = {**SIZES, grows: SIZES[grows] * factor}
            command = [sys.executable, "-m", "harness.bench.speed.growth", json.dumps(
                {"sizes": sizes, "impl": args.impl or ["mine"], "device": str(args.device)}
            )]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            points.append(json.loads(done.stdout))
        for part in PARTS:
            seconds = [point[part]["seconds"] for point in points]
            memory = [point[part]["mb"] for point in points]
            rows.append([
                f"{part}, {grows} x {', x '.join(str(f) for f in FACTORS)}",
                " / ".join(f"{point['rows']:,}" for point in points),
                " / ".join(f"{value:.3f}" for value in seconds),
                f"{power(seconds):.2f}",
                f"{worst(seconds):.2f}",
                " / ".join(f"{value:,.0f}" for value in memory),
                f"{power(memory):.2f}",
            ])  # fmt: skip
    head = ["", "interactions", "seconds", "power", "worst / line", "peak MB above before", "power"]
    about = (
        f"Start: {SIZES['users']} users, {SIZES['items']} items, {SIZES['rows a user']} rows a "
        f"user. Power: slope of the line through the logarithms, 1 is linear, below 1 has a share "
        f"that does not grow. Worst / line: largest time over the line a + b x size fitted to "
        f"all three. Dense item-item tables (EASE, transitions, cosine) are N x N."
    )
    return [about, "", *table(head, rows)]


def power(values: list[float]) -> float:
    """Slope of log value over log size; of the last step where the first values are nothing."""
    logs = np.log(np.maximum(values, 1e-6))
    return float(np.polyfit(np.log(FACTORS), logs, 1)[0])


def worst(values: list[float]) -> float:
    """Largest value in units of the line through all, fitted with equal relative weight."""
    x = np.asarray(FACTORS, dtype=float)
    y = np.asarray(values)
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    fitted = np.maximum(start + slope * x, 1e-9)
    return float(np.max(y / fitted))


# --- a point, in a process of its own -------------------------------------------------------------


def point(plan: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory of each part for one size."""
    import torch

    from harness import overlay

    torch.set_num_threads(1)
    overlay.install(overlay.resolve(plan["impl"], Path.cwd()))
    from harness.run import load_config
    from recsys import pipeline
    from recsys.data.candidates import CandidateFeatures
    from recsys.data.splits import make_split
    from recsys.training import loop

    device = torch.device(plan["device"])
    _, config = load_config(None, "synthetic", [])
    settings = config["retrieval"] | {"user_features": ["history"], "item_features": ["item_id"]}
    dataset = world(*plan["sizes"].values())
    split = make_split(dataset, "leave_last_one_out", ties="row", seed=0)
    data = pipeline.RetrievalData(dataset, split.train, settings, device)
    torch.manual_seed(0)
    model = pipeline.build_retrieval(data, settings).to(device)
    loss = pipeline.retrieval_loss(data, settings)
    fit = loop.FitConfig(**{**settings["fit"], "epochs": 1, "batch_size": 512})
    asked = pipeline.requests_after_all(dataset, data)
    lists: list[Any] = []  # items and scores of the full ranking

    def epoch() -> None:
        loop.fit(model, loss, len(data.positions), data.example_batch, fit)

    def ranking() -> None:
        model.eval()
        lists[:] = pipeline.retrieve(model, data, asked, k=100, chunk_size=256)

    def features() -> None:
        statistics = CandidateFeatures(dataset, split.train, device=device,
                                       **config["ranking"]["features"])  # fmt: skip
        items, scores = lists
        pipeline.RankingData(asked, items, scores, statistics)

    found: dict[str, Any] = {"rows": len(split.train)}
    for name, run in zip(PARTS, (epoch, ranking, features), strict=True):
        before, seconds = fresh_peak_mb(), math.inf
        for _ in range(REPEATS):
            begin = time.process_time() if device.type == "cpu" else time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.process_time() if device.type == "cpu" else time.perf_counter()
            seconds = min(seconds, now - begin)
        found[name] = {"seconds": seconds, "mb": peak_mb() - before}
    return found


def world(users: int, items: int, rows: int) -> Any:
    """Synthetic data of so many users and items, in which every user has so many rows.

    The generator leaves out what nobody rated; here the catalogue keeps its size, so that items can
    grow alone.
    """
    from recsys.data import synthetic

    with mock.patch.multiple(synthetic, SHORTEST=rows, LONGEST=rows):
        made = synthetic.generate(0, users=users, items=items)
    again = np.arange(items - made.num_items) % made.num_items  # each like one that was rated
    every = np.concatenate([np.arange(made.num_items), again])
    return dataclasses.replace(
        made,
        item_ids=np.arange(1, items + 1),
        titles=[made.titles[item] for item in every],
        years=made.years[every],
        genres=made.genres[every],
    )


def peak_mb() -> float:
    """Largest memory of this process since `fresh_peak_mb`; NaN where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def fresh_peak_mb() -> float:
    """What this process holds now, from which its largest memory is counted again."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except (AttributeError, OSError):
        return math.nan
    return peak_mb()


if __name__ == "__main__":
    print(json.dumps(point(json.loads(sys.argv[1]))))
