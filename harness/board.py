"""`kata` and `kata status`: where the learner is, from the record, without torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from datetime import date
from typing import Any

from harness import catalog, plan, record
from harness.catalog import Kata
from harness.plan import Plan
from harness.record import Result

WIDTH = 80
STATES = {
    "passing": "passing",
    "failing": "red",
    "stale": "stale",
    "not_started": "not started",
}


@dataclass(frozen=True)
class Standing:
    """Where one kata stands; `state` is a key of STATES."""

    kata: Kata
    state: str
    passed: int
    why: str = ""

    @property
    def total(self) -> int:
        return len(self.kata.rungs)


def main(args: argparse.Namespace) -> int:
    """Print the board, or the same for programs."""
    results = record.read()
    board = [standing(kata, results.get(kata.id)) for kata in catalog.load()]
    if args.json:
        print(json.dumps(status(board)))
    else:
        print("\n".join(lines(board, plan.read(), date.today())))
    return 0


def standing(kata: Kata, result: Result | None) -> Standing:
    """The state of a kata from its last result and its files."""
    attempted = any(catalog.is_attempted(kata, file) for file in kata.files)
    if not attempted:
        return Standing(kata, "not_started", 0)
    if result is None:
        return Standing(kata, "stale", 0, "no run recorded yet")
    outcomes = [result.rungs.get(rung.name) for rung in kata.rungs]
    passed = outcomes.count("passed")
    if record.is_stale(kata, result):
        return Standing(kata, "stale", passed, what_changed(kata, result))
    if result.reason:
        return Standing(kata, "failing", passed, result.reason)
    red = "failed" in result.rungs.values() or passed < len(outcomes) or not outcomes
    return Standing(kata, "failing" if red else "passing", passed)


def what_changed(kata: Kata, result: Result) -> str:
    parts = set(record.changed(kata, result))
    if parts & {"spec", "fixtures"}:
        return "the kata was updated"
    return "your code changed"


def status(board: list[Standing]) -> dict[str, Any]:
    """The board for programs. `passing` and `total` count the core katas."""
    core = [each for each in board if each.kata.track == "core"]
    return {
        "passing": sum(each.state == "passing" for each in core),
        "total": len(core),
        "katas": [
            {
                "id": each.kata.id,
                "track": each.kata.track,
                "state": each.state,
                "passed": each.passed,
                "total": each.total,
            }
            for each in board
        ],
    }


def lines(board: list[Standing], study: Plan, today: date) -> list[str]:
    """The board in 80 columns."""
    if not board:
        return ["There are no katas yet."]
    core = [each for each in board if each.kata.track == "core"]
    done = [each for each in core if each.state == "passing"]
    hours = sum(each.kata.hours for each in core)
    finished = sum(each.kata.hours for each in done)
    shown = [f"{len(done)} of {len(core)} katas passing, {finished:g} of {hours:g} hours"]
    if finished < hours:
        shown.append(study.line(hours - finished, today))
    shown.append("")
    phase = None
    for each in in_order(board):
        if heading(each.kata) != phase:
            phase = heading(each.kata)
            shown.append(phase)
        name = f"{each.kata.number} {each.kata.title}"
        name = name if len(name) <= 34 else name[:31] + "..."
        state = STATES[each.state]
        line = f"  {name:<34}  {state:<11}  {each.passed:>3}/{each.total:<3} {each.why}"
        shown.append(line.rstrip()[:WIDTH])
    return [*shown, "", next_step(board)]


def in_order(board: list[Standing]) -> list[Standing]:
    """By number, those of the core before the advanced ones."""
    return sorted(board, key=lambda each: each.kata.track != "core")


def heading(kata: Kata) -> str:
    if kata.track != "core":
        return "Advanced, beyond the core"
    return f"Phase {kata.phase}" if kata.phase[0].isdigit() else kata.phase.capitalize()


def next_step(board: list[Standing]) -> str:
    """The first kata that is not passing, and what to do about it; what there is to see by now."""
    seen = ""
    for each in in_order(board):
        if each.state == "passing":
            seen = f"see it: kata run    {each.kata.shows}\n" if each.kata.shows else ""
        command = f"kata test {each.kata.number}"
        if each.state in ("failing", "stale"):
            return f"{seen}next: {command}"
        if each.state == "not_started":
            files = ", ".join(f"src/recsys/{file}" for file in each.kata.files)
            return f"{seen}next: write {files}, then: {command}"
    return f"{seen}All katas pass."
