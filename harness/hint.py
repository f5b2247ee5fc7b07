"""`kata hint NN`: the next hint for the first red rung; from a nudge to nearly the answer."""

from __future__ import annotations

import argparse
import json
import textwrap

from harness import catalog, record
from harness.catalog import Kata, Rung
from harness.paths import STATE

SHOWN = STATE / "hints.json"  # kata -> rung -> how many of its hints were shown


def main(args: argparse.Namespace) -> int:
    """Show the next hint; when there is none left, the last one again and where to go on."""
    kata = catalog.find(args.kata)
    result = record.read().get(kata.id)
    outcomes = result.rungs if result else {}
    rung = first_red(kata, outcomes)
    if rung is None:
        print(f"Kata {kata.number} passes; there is nothing to hint at.")
        return 0
    count = advance(kata, rung)
    place = kata.rungs.index(rung) + 1
    words = rung.name.removeprefix("test_").replace("_", " ")
    print(f"kata {kata.number}, rung {place} of {len(kata.rungs)}: {words}")
    print(textwrap.fill(rung.says, 80))
    if result and record.is_stale(kata, result):
        print(f"(as of the last run; something changed since: kata test {kata.number})")
    print()
    if not rung.hints:
        print(f"This rung has no hints. The guide: kata guide {kata.number}")
        return 0
    level = min(count, len(rung.hints))
    print(f"hint {level} of {len(rung.hints)}")
    print(textwrap.indent(wrapped(rung.hints[level - 1]), "  "))
    if count > len(rung.hints):
        print(f"\nThat was the last one. kata guide {kata.number}, or: ask your tutor")
    elif level < len(rung.hints):
        print(f"\nmore: kata hint {kata.number}")
    return 0


def first_red(kata: Kata, outcomes: dict[str, str]) -> Rung | None:
    """The first rung that did not pass in the last run; the first of all before any run."""
    return next((rung for rung in kata.rungs if outcomes.get(rung.name) != "passed"), None)


def wrapped(text: str) -> str:
    return "\n".join(
        line if line.startswith(" ") else textwrap.fill(line, 78, break_long_words=False)
        for line in text.splitlines()
    )


def advance(kata: Kata, rung: Rung) -> int:
    """Count that one more hint of a rung is shown; a file that cannot be read begins anew."""
    try:
        shown = json.loads(SHOWN.read_text(encoding="utf-8"))
        count = int(shown.setdefault(kata.id, {}).get(rung.name, 0)) + 1
    except (OSError, ValueError, AttributeError, TypeError):
        shown, count = {kata.id: {}}, 1
    shown[kata.id][rung.name] = count
    STATE.mkdir(parents=True, exist_ok=True)
    record.save(SHOWN, json.dumps(shown, indent=1) + "\n")
    return count


def taken(kata: Kata) -> dict[str, int]:
    """Rung -> how many hints were asked for."""
    try:
        return dict(json.loads(SHOWN.read_text(encoding="utf-8")).get(kata.id, {}))
    except (OSError, ValueError, AttributeError):
        return {}
