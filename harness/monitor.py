"""A monitor on the service's log: what is asked and answered, beside how it was on good days.

    python -m harness.serve --log served.jsonl               # writes a line for each request
    python -m harness.monitor good.jsonl served.jsonl        # 0 good, 1 an alarm, 2 usage

A log holds one JSON object a line: ``time`` (s), ``status``, ``ms``, ``version``, and for answers
``history`` (how many items the user has seen), ``shown`` (how many items were answered), ``items``
(their ids), ``top`` (best score), ``spread`` (best less last score). It holds no user: drift needs
none. See docs/monitoring.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

Rows = list[dict[str, Any]]
Edge = Callable[..., Awaitable[None]]  # an ASGI application, its `receive` or its `send`

COLUMNS = ("history", "shown", "top", "spread")  # inputs, then what came of them
GOOD, LOOK, ALARM = "good", "look", "alarm"
SHIFTED, OTHER = 0.10, 0.25  # of a stability index: the usual rule of thumb for both levels
SURE = 3.09  # standard normal quantile of 99.9 %: what chance does not explain
FEWEST = 200  # answers that a comparison needs
BINS = 10


# --- writing --------------------------------------------------------------------------------------


class RequestLog:
    """ASGI middleware: a line for each answer to ``POST /recommend``.

    A log that cannot be written stops, says so once, and costs nobody an answer.

    Args:
        app: the service, as `recsys.inference.serving.create_app` makes it.
        file: where lines are appended.
        history: user id to how many items that user has seen; None where it is not known.
    """

    def __init__(
        self, app: Edge, file: TextIO | None, history: Callable[[int], int | None] | None = None
    ) -> None:
        self.app, self.file, self.history = app, file, history or (lambda user: None)

    async def __call__(self, scope: dict[str, Any], receive: Edge, send: Edge) -> None:
        asked = scope["type"] == "http" and (scope["method"], scope["path"])
        if asked != ("POST", "/recommend") or self.file is None:
            return await self.app(scope, receive, send)
        start, status, body = time.perf_counter(), 500, b""

        async def heard(message: dict[str, Any]) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")
            await send(message)

        try:
            await self.app(scope, receive, heard)
        finally:
            self._write(status, (time.perf_counter() - start) * 1e3, body)

    def _write(self, status: int, ms: float, body: bytes) -> None:
        row: dict[str, Any] = {"time": round(time.time(), 3), "status": status, "ms": round(ms, 3)}
        try:
            if status == 200:
                row |= self._answer(json.loads(body))
            if self.file is not None:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
        except Exception as error:
            self.file = None
            print(f"the log stops: {type(error).__name__}: {error}", file=sys.stderr)

    def _answer(self, said: dict[str, Any]) -> dict[str, Any]:
        scores = [item["score"] for item in said["items"]]
        return {
            "version": said["model_version"],
            "history": self.history(said["user_id"]),
            "shown": len(scores),
            "items": [item["item_id"] for item in said["items"]],
            "top": scores[0] if scores else None,
            "spread": scores[0] - scores[-1] if scores else None,
        }


# --- comparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One comparison: `now` beside `before`."""

    what: str
    before: float
    now: float
    level: str = GOOD
    why: str = ""


def stability_index(before: np.ndarray, now: np.ndarray) -> float:
    """The population stability index of two lists of shares: sum (now - before) ln(now / before).

    Symmetric, 0 only where all shares are equal; infinite where one of two is 0 (counts are
    smoothed before). Source: Yurdakul and Naranjo 2020, "Statistical properties of the population
    stability index".
    """
    return float(((now - before) * np.log(now / before)).sum())


def counts(before: Sequence[float], now: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How many values fall into each bin: one a value where there are few, else tenths of `before`.

    Values outside what `before` holds have bins of their own at both ends.
    """
    old, new = np.asarray(before, float), np.asarray(now, float)
    distinct = np.unique(old)
    if len(distinct) <= BINS:
        edges = np.sort(np.concatenate([distinct, np.nextafter(distinct, np.inf)]))
    else:
        edges = np.unique(np.quantile(old, np.linspace(0, 1, BINS + 1)[1:-1]))
    pair = [np.bincount(np.searchsorted(edges, x, "right"), minlength=len(edges) + 1)
            for x in (old, new)]  # fmt: skip
    used = pair[0] + pair[1] > 0
    return pair[0][used], pair[1][used]


def chance(bins: int, before: int, now: int) -> float:
    """What a stability index stays below in 99.9 % of comparisons where nothing has drifted.

    Without drift it is (1 / before + 1 / now) times chi-square with bins - 1 degrees of freedom;
    its quantile after Wilson and Hilferty.
    """
    free = max(bins - 1, 1)
    step = 2 / (9 * free)
    return free * (1 - step + SURE * math.sqrt(step)) ** 3 * (1 / before + 1 / now)


def drift(what: str, before: Sequence[float], now: Sequence[float]) -> Finding:
    """Whether a column drifted: its index beside the rule of thumb and beside chance."""
    old, new = counts(before, now)
    shares = [(c + 0.5) / (c.sum() + 0.5 * len(c)) for c in (old, new)]
    index, noise = stability_index(*shares), chance(len(old), len(before), len(now))
    level = GOOD
    if index > max(noise, SHIFTED):
        level = ALARM if index > OTHER else LOOK
    why = f"stability index {index:.2f}, by chance up to {noise:.2f}"
    medians = float(np.median(before)), float(np.median(now))
    return Finding(f"{what}, median", *medians, level, why)


def rate(what: str, before: Rows, now: Rows, is_one: Callable[[dict[str, Any]], bool],
         most: float) -> Finding:  # fmt: skip
    """An alarm where a share of requests grew by more than `most`, and by more than chance."""
    old, new = (sum(map(is_one, rows)) / len(rows) for rows in (before, now))
    both = (old * len(before) + new * len(now)) / (len(before) + len(now))
    chance = SURE * math.sqrt(both * (1 - both) * (1 / len(before) + 1 / len(now)))
    return Finding(what, old, new, ALARM if new - old > max(most, chance) else GOOD)


def slowness(before: Rows, now: Rows) -> Finding:
    """The 95th percentile of times to an answer: look above twice, alarm above three times."""
    old, new = (float(np.quantile([row["ms"] for row in rows], 0.95)) for rows in (before, now))
    level = ALARM if new > 3 * old + 1 else LOOK if new > 2 * old + 1 else GOOD
    return Finding("ms, 95th percentile", old, new, level)


def variety(before: Rows, now: Rows) -> Finding:
    """How many different items equally many answers hold: an alarm where it halves."""
    size = min(len(before), len(now))
    old, new = (len({i for row in rows[-size:] for i in row["items"]}) for rows in (before, now))
    return Finding("different items shown", old, new, ALARM if new < old / 2 else GOOD)


def compare(before: Rows, now: Rows) -> list[Finding]:
    """Everything that is worth being woken up for, `now` beside `before`.

    Raises:
        ValueError: too few requests, or too few answers on good days, to say anything.
    """
    good = [[row for row in rows if row["status"] == 200] for rows in (before, now)]
    if min(len(good[0]), len(now)) < FEWEST:
        raise ValueError(
            f"a comparison needs at least {FEWEST} answers on good days and {FEWEST} requests "
            f"since, not {len(good[0])} and {len(now)}"
        )
    found = [
        rate("share of failures (5xx)", before, now, lambda row: row["status"] >= 500, 0.01),
        rate("share of unknown users (404)", before, now, lambda row: row["status"] == 404, 0.05),
        rate("share of refused (other 4xx)", before, now,
             lambda row: 400 <= row["status"] < 500 and row["status"] != 404, 0.05),
        slowness(before, now),
    ]  # fmt: skip
    if len(good[1]) < FEWEST:
        why = f"fewer than {FEWEST}: their scores are not compared"
        return [*found, Finding("answers", len(good[0]), len(good[1]), ALARM, why)]
    for what in COLUMNS:
        old, new = ([row[what] for row in rows if row[what] is not None] for rows in good)
        if min(len(old), len(new)) >= FEWEST:
            found.append(drift(what, old, new))
    return [*found, variety(*good)]


# --- the command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; 0 where nothing alarms, 1 where something does, 2 for bad input."""
    made = argparse.ArgumentParser(
        prog="python -m harness.monitor", description="What a service answers, beside good days."
    )
    made.add_argument("before", type=Path, metavar="GOOD.jsonl", help="the log of good days")
    made.add_argument("now", type=Path, metavar="NOW.jsonl", help="the log to judge")
    made.add_argument("--json", action="store_true", help="for programs")
    args = made.parse_args(argv)
    try:
        found = compare(read(args.before), read(args.now))
    except (OSError, ValueError) as error:
        print(f"monitor: {error}", file=sys.stderr)
        return 2
    red = any(each.level == ALARM for each in found)
    if args.json:
        print(json.dumps({"alarm": red, "findings": [asdict(each) for each in found]}))
        return int(red)
    print(f"{'':<29} {'good days':>10} {'now':>10}")
    for each in found:
        print(f"{each.what:<29} {each.before:>10.4g} {each.now:>10.4g}  {each.level}".rstrip())
        if each.why and each.level != GOOD:
            print(f"    {each.why}")
    return int(red)


def read(path: Path) -> Rows:
    """The lines of a log; one that a crash cut off at the end is left out.

    Raises:
        ValueError: another line that is not a log's.
    """
    rows: Rows = []
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not {"status", "ms"} <= row.keys():
                raise ValueError("no status or ms")
            if row["status"] == 200 and not {"items", *COLUMNS} <= row.keys():
                raise ValueError(f"an answer without {', '.join({'items', *COLUMNS} - row.keys())}")
        except (ValueError, AttributeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number} is no line of a log: {error}") from None
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
