"""`kata review [NN]`: what a reviewer would say about the learner's code, each with its reason.

Static rules (rules.py) know what is special to this field; ruff says what it knows; what the code
does when it runs is measured (measured.py). A finding is advice: the specs decide what is right.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import catalog
from harness.catalog import Kata
from harness.paths import ROOT, SRC


@dataclass(frozen=True, order=True)
class Finding:
    """One remark. `read` names what to read about it."""

    file: str
    line: int
    rule: str
    what: str
    why: str
    read: str


def main(args: argparse.Namespace) -> int:
    """Print the findings in what the learner wrote; 1 if there are any, 0 if not."""
    katas = catalog.load()
    chosen = [catalog.find(name, katas) for name in args.katas] or katas
    found: list[Finding] = []
    looked = 0
    for kata in chosen:
        files = [file for file in kata.files if catalog.is_attempted(kata, file)]
        looked += len(files)
        found += review(kata, {file: SRC / "recsys" / file for file in files})
    if args.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    elif not looked:
        print("Nothing is written yet in what was asked for.")
    else:
        print("\n".join(told(found)) or f"No findings in {looked} file{'s' * (looked != 1)}.")
    return 1 if found else 0


def review(kata: Kata, files: dict[str, Path], *, measure: bool = True) -> list[Finding]:
    """All findings in a kata's files (learner file -> where it lies), by line."""
    from harness.review import linter, measured, rules

    found: set[Finding] = set()
    for path in files.values():
        found.update(rules.findings(path, shown(path)))
        found.update(linter.findings(path, shown(path)))
    if measure and files:
        found.update(measured.findings(kata))
    return sorted(found)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def told(found: list[Finding]) -> Iterator[str]:
    """The findings in 80 columns; the reason of a rule is given once."""
    explained: set[str] = set()
    for finding in found:
        yield f"{finding.file}:{finding.line}  {finding.rule}"
        yield textwrap.indent(textwrap.fill(finding.what, 76), "  ")
        if finding.rule not in explained:
            explained.add(finding.rule)
            yield textwrap.indent(textwrap.fill(f"why: {finding.why}", 76), "  ")
            yield textwrap.indent(textwrap.fill(f"read: {finding.read}", 76), "  ")
        yield ""
