"""`kata check --faults`: the long form of the faults, the tests again and again, and the table.

    python -m reference_tests.faults [AREA ...] [--repeat N] [--whole N]

What an area counted is kept in results/AREA.json, so that one can be tried without the others;
docs/faults.md is made from those.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.paths import ROOT
from reference_tests.faults import table

HERE = "reference_tests/faults"
SECONDS = 3600.0  # a run that takes longer has failed


def main() -> int:
    """0 if all was as expected; writes docs/faults.md."""
    areas = [*table.AREAS, table.FLAKINESS]
    parser = argparse.ArgumentParser(prog="kata check --faults")
    parser.add_argument("areas", nargs="*", metavar="AREA", help=", ".join(areas))
    parser.add_argument("--repeat", type=int, default=3, help="runs of the short form, under load")
    parser.add_argument("--whole", type=int, default=0, help="runs of all tests, under load")
    args = parser.parse_args()
    if unknown := set(args.areas) - set(areas):
        parser.error(f"areas are {', '.join(areas)}, not {', '.join(sorted(unknown))}")
    good = True
    for area in args.areas or areas:
        begin = time.monotonic()
        if area == table.FLAKINESS:
            went_well, rows = again(args.repeat, args.whole)
        else:
            went_well, rows = at_length(area)
        table.keep(area, rows, time.monotonic() - begin)
        good &= went_well
    table.write()
    print(f"kata check: {table.FILE.relative_to(ROOT)} is written", flush=True)
    return 0 if good else 1


def at_length(area: str) -> tuple[bool, list[Any]]:
    """The long form of an area and the tests elsewhere that belong to it; what they counted."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        counts = Path(folder) / "counts.json"
        paths = [f"{HERE}/test_{area}.py", *table.files(table.AREAS[area])]
        good, _ = pytest(paths, KATA_FAULTS=str(counts))
        return good, json.loads(counts.read_text()) if counts.is_file() else []


def again(repeat: int, whole: int) -> tuple[bool, list[Any]]:
    """The tests again and again, each time in another order and with every core busy."""
    good, rows = True, []
    for what, paths, times in (
        ("the short form of this", [HERE], repeat),
        ("all tests", ["reference_tests"], whole),
    ):
        counts: dict[str, int] = {}
        for seed in range(times):
            with busy():
                went_well, said = pytest(paths, KATA_ORDER=str(seed))
            good &= went_well
            counts[said] = counts.get(said, 0) + 1
        if counts:
            rows.append([table.FLAKINESS, f"{what}, in a random order, every core busy", counts])
    return good, rows


def pytest(paths: list[str], **env: str) -> tuple[bool, str]:
    """Run tests; whether all were green, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", "--durations=5", *paths]
    said = " ".join([*(f"{k}={v}" for k, v in env.items()), "python", *command[1:]])
    print(f"kata check: {said}", flush=True)
    env = {k: v for k, v in os.environ.items() if k not in ("KATA_FAULTS", "KATA_ORDER")} | env
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    last = ""
    for text in child.stdout:
        print(text, end="", flush=True)
        last = text.strip() or last
    said = re.sub(r" in [\d.]+s.*| \(.*", "", last.strip("= "))
    return child.wait(SECONDS) == 0, said


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A process for each core that computes meanwhile."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinners = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


if __name__ == "__main__":
    sys.exit(main())
