"""What the learner's code does when it runs: the kata's probes under the cost counters."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

from harness.catalog import Kata
from harness.paths import ROOT
from harness.review import Finding

SECONDS = 60
HOT = 120  # operations of one line in one probe, whose inputs have a dozen rows at most


def findings(kata: Kata) -> Iterator[Finding]:
    """Lines that dispatch very many operations for small inputs: loops over rows in Python.

    The probes run in a process of their own, on the learner's code with the reference in its gaps.
    """
    if not (kata.folder / "probes.py").is_file():
        return
    command = [sys.executable, "-m", "harness.review.measured", kata.id]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return
    for text in done.stdout.splitlines():
        file, line, operations, probe = text.split("\t")
        yield Finding(
            file=file,
            line=int(line),
            rule="hot-line",
            what=f"this line ran {operations} tensor operations in the probe {probe}, whose inputs "
            "have a few rows",
            why="each operation costs a few microseconds whatever its size: one for all rows is "
            "hundreds of times cheaper than one for each",
            read="Horace He, Making Deep Learning Go Brrrr From First Principles (overhead)",
        )


def main(name: str) -> None:
    """Print file, line, operations and probe of each hot line, separated by tabs."""
    from harness import catalog, diagnosis, overlay
    from harness.cost import count
    from harness.message import shown

    overlay.install(overlay.resolve(["mine"], ROOT))
    kata = catalog.find(name)
    worst: Counter[tuple[str, int]] = Counter()
    where: dict[tuple[str, int], str] = {}
    for probe in diagnosis.probes_of(kata):
        try:
            cost = count(probe.ask)
        except Exception:  # what is wrong is the spec's business
            continue
        for place, operations in cost.by_place.items():
            if place is None:
                continue
            key = (shown(place.file), place.line)
            if operations > worst[key]:
                worst[key], where[key] = operations, probe.name
    for (file, line), operations in worst.items():
        if operations >= HOT and file.startswith("src/"):
            print(file, line, operations, where[(file, line)], sep="\t")


if __name__ == "__main__":
    main(sys.argv[1])
