"""`kata check --strength [NN ...]`: how strong the specs are, as a table.

The result of each kata is kept in results/NN_name.json with a digest of what it depends on, and
docs/spec-strength.md is made from those.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness import catalog
from harness.catalog import Kata
from harness.paths import REFERENCE_TESTS
from reference_tests.strength import table
from reference_tests.strength.catalogue import CatalogueError
from reference_tests.strength.measure import Strength, Wanted, Workers, digest_of, measure

RESULTS = REFERENCE_TESTS / "strength" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the katas asked for; 0 if each holds what is asked of it, 1 if not."""
    args = parser().parse_args(argv)
    if args.table:
        table.write([stored(kata) for kata in catalog.load()])
        return 0
    katas = [catalog.find(name) for name in args.katas] or catalog.load()
    if args.touched:
        katas = touched(katas)
    parts = (args.mistakes, args.alternates, args.mutants)
    every = not any(parts)
    wanted = Wanted(
        *(part or every for part in parts),
        only=tuple(args.only or ()),
        all_mutants=args.all_mutants,
        write=args.write,
        tell=lambda line: print(line, flush=True) if args.verbose or args.only else None,
    )
    good = True
    for kata in katas:
        begin = time.monotonic()
        try:
            with Workers(args.jobs, kata.preload) as workers:
                found = measure(kata, workers, wanted)
        except CatalogueError as error:
            print(f"{kata.id}: {error}")
            good = False
            continue
        seconds = time.monotonic() - begin
        troubles = found.troubles + ([] if wanted.only else table.below(found, wanted))
        print(f"{table.line(found)}  {seconds:.0f} s", flush=True)
        for trouble in troubles:
            print(f"  {trouble}", flush=True)
        good = good and not troubles
        whole = every and not wanted.only
        if args.write and whole:
            keep(kata, found)
    if args.write:
        table.write([stored(kata) for kata in catalog.load()])
    return 0 if good else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m reference_tests.strength", description=__doc__)
    made.add_argument("katas", nargs="*", metavar="NN")
    made.add_argument("--mistakes", action="store_true", help="these alone")
    made.add_argument("--alternates", action="store_true", help="these alone")
    made.add_argument("--mutants", action="store_true", help="these alone")
    made.add_argument("--all-mutants", action="store_true", help="not only the usual sample")
    made.add_argument("--only", action="append", metavar="ID", help="one case, with its message")
    made.add_argument("--touched", action="store_true", help="katas whose result is out of date")
    made.add_argument("--write", action="store_true", help="diagnosis, transcripts, results, table")
    made.add_argument("--table", action="store_true", help="write docs/spec-strength.md only")
    made.add_argument("-v", "--verbose", action="store_true", help="a line for each case")
    jobs = min(2, os.cpu_count() or 1)
    made.add_argument("--jobs", type=int, default=jobs, help=f"processes (default: {jobs})")
    return made


def touched(katas: list[Kata]) -> list[Kata]:
    """Those whose result is out of date; says which have none."""
    never = [kata for kata in katas if "digest" not in stored(kata)]
    if never:
        print(f"not measured yet: {', '.join(kata.id for kata in never)}", flush=True)
    found = [kata for kata in katas if stored(kata).get("digest", "") not in ("", digest_of(kata))]
    if not found:
        print("no kata was touched since its strength was measured", flush=True)
    return found


def file_of(kata: Kata) -> Path:
    return RESULTS / f"{kata.id}.json"


def stored(kata: Kata) -> dict[str, Any]:
    try:
        return json.loads(file_of(kata).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"kata": kata.id}


def keep(kata: Kata, found: Strength) -> None:
    RESULTS.mkdir(exist_ok=True)
    made = {"digest": digest_of(kata), "torch": version("torch").partition("+")[0]}
    made |= {"python": platform.python_version(), **asdict(found)}
    file_of(kata).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
