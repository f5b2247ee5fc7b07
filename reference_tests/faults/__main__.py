"""`kata check --faults`: the long form of the faults, the tests again and again, and the table.

    python -m reference_tests.faults [--repeat N] [--whole N]
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

from harness.paths import ROOT
from reference_tests.faults import table

HERE = "reference_tests/faults"
SECONDS = 3600.0  # a run that takes longer has failed


def main() -> int:
    """0 if all was as expected; writes docs/faults.md."""
    parser = argparse.ArgumentParser(prog="kata check --faults")
    parser.add_argument("--repeat", type=int, default=3, help="runs of the short form, under load")
    parser.add_argument("--whole", type=int, default=0, help="runs of all tests, under load")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        counts = Path(folder) / "counts.json"
        good = pytest([HERE, *table.files()], KATA_FAULTS=str(counts))[0]
        rows = json.loads(counts.read_text()) if counts.is_file() else []
    for what, paths, times in (
        ("the short form of this, in a random order, every core busy", [HERE], args.repeat),
        ("all tests, in a random order, every core busy", ["reference_tests"], args.whole),
    ):
        counts = {}
        for seed in range(times):
            with busy():
                went_well, said = pytest(paths, KATA_ORDER=str(seed))
            good &= went_well
            happened = "no failure" if went_well else f"RED: {said}"
            counts[happened] = counts.get(happened, 0) + 1
        if counts:
            rows.append([table.FLAKINESS, f"{what} (the last: {said})", counts])
    table.write(rows, "".join(f" {word}" for word in sys.argv[1:]), time.monotonic() - begin)
    print(f"kata check: {table.FILE.relative_to(ROOT)} is written", flush=True)
    return 0 if good else 1


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
