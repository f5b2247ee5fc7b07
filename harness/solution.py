"""`kata solution NN`: the reference beside the learner's file, once the kata passes."""

from __future__ import annotations

import argparse
import difflib
import os
import sys

from harness import board, catalog, record
from harness.catalog import Kata
from harness.paths import REFERENCE, REFERENCE_TESTS, ROOT, SRC


def main(args: argparse.Namespace) -> int:
    """Show what the reference does otherwise; before the kata passes only with --spoil."""
    kata = catalog.find(args.kata)
    state = board.standing(kata, record.read().get(kata.id)).state
    if state != "passing" and not args.spoil:
        print(
            f"Kata {kata.number} is not passing yet ({board.STATES[state]}), and what you learn is "
            f"what you write yourself.\nnext: kata hint {kata.number}\n"
            f"The reference all the same: kata solution {kata.number} --spoil"
        )
        return 1
    for file in kata.files:
        print("\n".join(compared(kata, file)))
    others = sorted((REFERENCE_TESTS / "alternates" / kata.id).glob("*"))
    if others:
        names = ", ".join(other.stem for other in others)
        place = (REFERENCE_TESTS / "alternates" / kata.id).relative_to(ROOT).as_posix()
        print(f"\nOther ways that pass, in {place}: {names}")
    return 0


def compared(kata: Kata, file: str) -> list[str]:
    """The reference as a difference from the learner's file; whole where nothing is written."""
    reference = (REFERENCE / "recsys" / file).read_text(encoding="utf-8").splitlines()
    if not catalog.is_attempted(kata, file):
        return [f"--- reference_tests/solution/recsys/{file}", *reference]
    mine = (SRC / "recsys" / file).read_text(encoding="utf-8", errors="replace").splitlines()
    names = f"src/recsys/{file}", f"reference_tests/solution/recsys/{file}"
    lines = list(difflib.unified_diff(mine, reference, *names, lineterm=""))
    return [coloured(line) for line in lines] or [f"src/recsys/{file} is the reference's"]


def coloured(line: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or line[:1] not in "+-@":
        return line
    return f"\033[{dict(zip('+-@', (32, 31, 36), strict=True))[line[0]]}m{line}\033[0m"
