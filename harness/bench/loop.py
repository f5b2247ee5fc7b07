"""`kata bench --loop`: the learner's loop, measured in a copy of the checkout.

From a save to the verdict of `kata watch`, a cold `pytest`, the board, and `import torch` beside
them.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from harness import catalog, stubs
from harness.bench.speed import spread
from harness.catalog import Kata
from harness.paths import REFERENCE, ROOT

UNIT = ("01", "02", "03", "04", "06")  # katas whose spec is a unit test of one small part
HEADER = """# From a save to the verdict

Written by `{command}` on {date}: {machine},
Python {python}, torch {torch}. "Red" is the time until the message of the first red rung, "green"
until all rungs have passed; cold is a `pytest katas/NN` of its own, a save is answered by
`kata watch`. Aims: board under 0.3 s; cold red at most 1.6 times `import torch`, green 2.3; a save
under 0.4 s and a fifth of the cold run.

"""
COPIED = (
    *("harness", "katas", "fixtures", "src", "docs", "configs", "reference_tests/solution"),
    *("conftest.py", "tox.ini", "pyproject.toml"),
)


def main(args: argparse.Namespace) -> int:
    """Print the table of the katas asked for, those of `UNIT` by default."""
    chosen = args.katas or UNIT
    lines = loop([catalog.find(name) for name in chosen], args.rounds)
    print("\n".join(lines))
    if args.out:
        text = HEADER.format(
            command=" ".join(["kata bench --loop", f"--rounds {args.rounds}", *args.katas]),
            date=f"{datetime.now():%Y-%m-%d}",
            machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            python=platform.python_version(),
            torch=version("torch"),
        )
        Path(args.out).write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


def loop(katas: list[Kata], rounds: int) -> list[str]:
    """A table: for each kata the cold and the warm verdict, red and green, in seconds."""
    with tempfile.TemporaryDirectory(prefix="kata-bench-") as folder:
        checkout = Path(folder) / "checkout"
        copy(checkout)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KATA_", "PYTEST_"))}
        env["OMP_NUM_THREADS"] = "1"

        def cold(*command: str) -> float:
            begin = time.monotonic()
            done = [sys.executable, *command]
            subprocess.run(done, cwd=checkout, env=env, capture_output=True, check=False)
            return time.monotonic() - begin

        cold("-c", "import torch")  # the disk's cache is warm from now on
        imports = [cold("-c", "import torch") for _ in range(rounds)]
        boards = [cold("-m", "harness") for _ in range(rounds)]
        base = statistics.median(imports)
        lines = [
            f"median of {rounds} rounds (least to most), seconds; one thread",
            f"import torch {spread(imports, digits=2)}, board {spread(boards, digits=2)}",
            "",
            "| kata | cold, stub red | x torch | cold, green | x torch | save to red | "
            "save to green | of the cold green |",
            "| --- | --- | ---: | --- | ---: | --- | --- | ---: |",
        ]
        for kata in katas:
            red, green = [], []
            for each in catalog.load():  # all but this one are written, so that what is red is its
                write(each, checkout, stub=each.id == kata.id)
            for _ in range(rounds):
                red.append(cold("-m", "pytest", f"katas/{kata.id}", "-q"))
                green.append(cold("-m", "pytest", f"katas/{kata.id}", "-q", "--impl", "reference"))
            saves = watch(kata, checkout, env, rounds)
            cells = [
                kata.id,
                spread(red, digits=2),
                f"{statistics.median(red) / base:.2f}",
                spread(green, digits=2),
                f"{statistics.median(green) / base:.2f}",
                spread(saves["red"], digits=2),
                spread(saves["green"], digits=2),
                f"{statistics.median(saves['green']) / statistics.median(green):.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return lines


def copy(checkout: Path) -> None:
    """What a learner's loop needs of this checkout."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        source, target = ROOT / name, checkout / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def write(kata: Kata, checkout: Path, *, stub: bool) -> None:
    """Put a kata's stubs, or else the reference, where the learner writes."""
    for file in kata.files:
        right = (REFERENCE / "recsys" / file).read_text("utf-8")
        text = stubs.generate(kata, file) if stub else right
        (checkout / "src/recsys" / file).write_text(text, encoding="utf-8")


def watch(kata: Kata, checkout: Path, env: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Seconds from a save to the first verdict that `kata watch` prints, red and green."""
    empty = {file: stubs.generate(kata, file) for file in kata.files}
    right = {file: (REFERENCE / "recsys" / file).read_text("utf-8") for file in kata.files}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "watch", kata.number],
        cwd=checkout,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    said = ""

    def until(pattern: str) -> None:
        nonlocal said
        end = time.monotonic() + 120
        while not (found := re.search(pattern, said)):
            if time.monotonic() > end or process.poll() is not None:
                raise RuntimeError(f"kata watch {kata.number} said no verdict:\n{said}")
            said += (process.stdout.read() or b"" if process.stdout else b"").decode()
            time.sleep(0.001)
        said = said[found.end() :]

    def save(texts: dict[str, str], number: int) -> float:
        begin = time.monotonic()
        for file, text in texts.items():
            path = checkout / "src/recsys" / file
            path.write_text(f"{text}\n# {number}\n", encoding="utf-8")
            begin = time.monotonic()
        return begin

    seconds: dict[str, list[float]] = {"red": [], "green": []}
    try:
        until(r"is red: \d+ of \d+ rungs.*\n")
        for number in range(rounds):
            for kind, texts, first in (
                ("green", right, r"passes: \d+ of \d+ rungs.*\n"),
                ("red", empty, r"next: .*\n"),
            ):
                begin = save(texts, number)
                until(first)
                seconds[kind].append(time.monotonic() - begin)
                if kind == "red":
                    until(r"is red: \d+ of \d+ rungs.*\n")
                time.sleep(0.2)
    finally:
        process.kill()
        process.communicate()
        for file, text in empty.items():
            (checkout / "src/recsys" / file).write_text(text, encoding="utf-8")
    return seconds
