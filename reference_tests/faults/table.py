"""docs/faults.md: what was tried, how often, and what happened."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.paths import ROOT

FILE = ROOT / "docs" / "faults.md"
AREAS = {  # test_NAME.py -> its heading
    "data": "Data",
    "training": "Training",
    "service": "Service",
    "harness": "Harness",
    "determinism": "Determinism",
    "supply": "Supply",
}
FLAKINESS = "flakiness"
RESULTS = Path(__file__).with_name("results")
# What tests in other folders show of it: (area, what) -> how their node ids begin. The long form
# runs these files too.
_TESTS = "reference_tests"
ELSEWHERE: dict[tuple[str, str], tuple[str, ...]] = {
    ("Data", "hand-made wrong files, each with the line and what was expected"): (
        f"{_TESTS}/data/test_data_movielens.py",
    ),
    ("Data", "downloads that break off or lie; zips with `../`, links, bombs; a full disk"): (
        f"{_TESTS}/data/test_data_download.py",
    ),
    ("Service", "requests made from its own OpenAPI description, torn bodies"): (
        f"{_TESTS}/system/test_serving_fuzz.py",
    ),
    ("Harness", "learner code that loops, exits, crashes, floods, forks, patches"): (
        f"{_TESTS}/house/test_isolation.py",
        f"{_TESTS}/house/test_runner.py",
    ),
    ("Harness", "the record killed in mid-write, on a full disk, unreadable, with two writers"): (
        f"{_TESTS}/house/test_record.py",
    ),
    ("Harness", "the set-up killed, interrupted, twice at once, without network"): (
        f"{_TESTS}/setup/test_real_setup.py",
    ),
    ("Supply", "one exact pin for all that is installed, on each Python"): (
        f"{_TESTS}/setup/test_pins.py",
    ),
}  # fmt: skip

HEAD = """# Faults

What was tried against the whole, how often, and what happened. Written by
`kata check --faults [AREA ...]`; do not edit. A short form of it is part of `kata check`. The tests
are in `reference_tests/faults/`; what tests in other folders show is counted too. All traffic goes
to 127.0.0.1 and is bounded in count and time.
"""


def files(area: str) -> list[str]:
    """The files of ELSEWHERE that belong to an area."""
    return sorted(name for (where, _), names in ELSEWHERE.items() for name in names
                  if where == area)  # fmt: skip


def keep(area: str, rows: list[Any], seconds: float) -> None:
    """Write what an area counted."""
    RESULTS.mkdir(exist_ok=True)
    found = {"seconds": round(seconds), "torch": version("torch"), "rows": rows}
    found["python"] = f"{platform.python_version()}, {platform.system()}"
    (RESULTS / f"{area}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write() -> None:
    """Write docs/faults.md from what is kept."""
    text, told = HEAD, []
    for area in [*AREAS, FLAKINESS]:
        file = RESULTS / f"{area}.json"
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        lines = [line(what, counts) for _, what, counts in found["rows"]]
        text += f"\n## {area.capitalize()}\n\n| tried | times | what happened |\n"
        text += "| --- | ---: | --- |\n" + "\n".join(sorted(lines)) + "\n"
        told.append(f"{area} {found['seconds'] / 60:.1f}")
    text += f"\nMinutes: {', '.join(told)}. torch {found['torch']}, Python {found['python']}.\n"
    FILE.write_text(text, encoding="utf-8")


def line(what: str, counts: dict[str, Any]) -> str:
    by_number = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    happened = "; ".join(f"{times:,} {name}" if len(counts) > 1 else name
                         for name, times in by_number)  # fmt: skip
    return f"| {what} | {sum(counts.values()):,} | {happened} |"
