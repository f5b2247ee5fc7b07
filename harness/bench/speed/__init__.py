"""`kata bench --speed`: how fast the system is, beside its peers and the physical bound.

Everything in a table was measured in one process, in turns, on one thread: a round runs each
contestant once, and what is shown is the median of the rounds with the lowest and the highest.
Ratios are of the same round, in CPU time (of the whole process), on a GPU in wall time. A peer that
is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from harness import bench
from harness.errors import UsageError

PARTS = {
    "training": "Training",
    "step": "One training step",
    "evaluation": "Evaluation",
    "growth": "Growth",
}
REPEATS = 3  # of a measurement of growth, whose fastest counts: it is too long for rounds


def main(args: argparse.Namespace) -> int:
    """Measure the parts asked for, print their tables, and keep them in a file if one is named."""
    from harness import memory, overlay
    from harness.run import resolve_device

    chosen = args.speed or ["training", "step", "evaluation"]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise UsageError(f"--speed measures {', '.join(PARTS)}; {unknown[0]!r} is none of them")
    memory.keep()
    import torch

    torch.set_num_threads(1)
    overlay.install(overlay.resolve(args.impl or ["mine"], Path.cwd()))
    args.device = resolve_device(args.device)
    for part in chosen:
        measure = importlib.import_module(f"harness.bench.speed.{part}").measure
        lines = [circumstances(args, part), "", *measure(args)]
        print("\n".join([f"## {PARTS[part]}", *lines, ""]), flush=True)
        if args.out:
            keep(Path(args.out), PARTS[part], lines)
    return 0


def retrieval_data(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any], Any]:
    """Data set, split, settings of retrieval and its training examples, as the options ask for."""
    from harness.run import load_config
    from recsys import pipeline
    from recsys.data.splits import make_split

    dataset = bench.dataset(args.data)
    _, config = load_config(args.config, dataset.name, args.set or [])
    settings = config["retrieval"] | {"item_features": ["item_id", "genres"]}
    split = make_split(dataset, config["split"], ties=config["ties"], seed=0)
    return dataset, split, settings, pipeline.RetrievalData(
        dataset, split.train, settings, args.device
    )


# --- measuring ------------------------------------------------------------------------------------


class Times:
    """Seconds of each round of one contestant, on the wall and of the CPU."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def own(self, device: Any) -> list[float]:
        """Of the CPU where that does the work, which others on the machine disturb the least."""
        return self.wall if device.type == "cuda" else self.cpu


def in_turns(
    contestants: dict[str, Callable[[], Any]], rounds: int, device: Any = None
) -> dict[str, Times]:
    """Run each contestant once a round, after one run that does not count."""
    times = {name: Times() for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if device is not None and device.type == "cuda":
                import torch

                torch.cuda.synchronize(device)
            if number:
                times[name].cpu.append(time.process_time() - cpu)
                times[name].wall.append(time.perf_counter() - wall)
    return times


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median (lowest to highest)."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratios(above: list[float], below: list[float]) -> list[float]:
    """Of the same round, so that what slows a round down does not count."""
    return [a / b for a, b in zip(above, below, strict=True)]


# --- tables ---------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def circumstances(args: argparse.Namespace, part: str) -> str:
    """When, on what and with which command."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    command = f"kata bench --speed {part} --data {Path(args.data).name}"
    command += "".join(f" --set {override}" for override in args.set or [])
    impl = " ".join(args.impl or ["mine"])
    rounds = f"the fastest of {REPEATS}" if part == "growth" else f"{args.rounds} rounds"
    command += f" --device {args.device}" if args.device.type != "cpu" else ""
    return (
        f"{datetime.now():%Y-%m-%d}, {machine(args.device)}, Python {platform.python_version()}, "
        f"{versions}; one thread, {rounds}, `{command}` on `--impl {impl}`."
    )


def machine(device: Any) -> str:
    """The processor, in general terms."""
    model = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    text = f"{os.cpu_count()} cores ({model})"
    if device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(device)}, {text}"
    return text + ", no GPU"


def keep(path: Path, title: str, lines: list[str]) -> None:
    """Put a section into a Markdown file, in the place of the one of the same title."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Speed\n"
    head, *sections = text.rstrip().split("\n## ")
    new = "\n".join([title, *lines]).rstrip()
    places = [n for n, each in enumerate(sections) if each.splitlines()[0] == title]
    if places:
        sections[places[0]] = new + "\n"
    else:
        sections.append(new)
    sections = [each.strip() + "\n" for each in sections]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n## ".join([head.rstrip() + "\n", *sections]), encoding="utf-8")
