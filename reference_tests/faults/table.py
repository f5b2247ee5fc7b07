"""docs/faults.md: what was tried, how often, and what happened."""

from __future__ import annotations

import platform
from importlib.metadata import version
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
FLAKINESS = "Flakiness"
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
`kata check --faults{options}`; do not edit. A short form of it is part of `kata check`.
The tests are in `reference_tests/faults/`; what tests in other folders show is counted too.
All traffic goes to 127.0.0.1 and is bounded in count and time.
"""


def files() -> list[str]:
    """The files of ELSEWHERE."""
    return sorted({name.partition("::")[0] for names in ELSEWHERE.values() for name in names})


def write(rows: list[tuple[str, str, dict[str, int]]], options: str, seconds: float) -> None:
    text = HEAD.format(options=options)
    for area in [*AREAS.values(), FLAKINESS]:
        lines = [line(what, counts) for where, what, counts in rows if where == area]
        if lines:
            text += f"\n## {area}\n\n| tried | times | what happened |\n| --- | ---: | --- |\n"
            text += "\n".join(sorted(lines)) + "\n"
    text += (
        f"\n{seconds / 60:.0f} minutes, torch {version('torch')}, Python "
        f"{platform.python_version()}, {platform.system()}.\n"
    )
    FILE.write_text(text, encoding="utf-8")


def line(what: str, counts: dict[str, Any]) -> str:
    by_number = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    happened = "; ".join(f"{times:,} {name}" if len(counts) > 1 else name
                         for name, times in by_number)  # fmt: skip
    return f"| {what} | {sum(counts.values()):,} | {happened} |"
