"""`kata report`: how far the learner is, as Markdown and a picture in progress/."""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from harness import board, catalog, decisions, hint, record
from harness.board import Standing
from harness.paths import PROGRESS, ROOT

RUNS = ROOT / "runs"
PAGE, PICTURE = "report.md", "report.png"


def main(args: argparse.Namespace) -> int:
    """Write progress/report.md and progress/report.png."""
    results = record.read()
    standings = [board.standing(kata, results.get(kata.id)) for kata in catalog.load()]
    past = record.history()
    PROGRESS.mkdir(exist_ok=True)
    drawn = plot(past, standings, PROGRESS / PICTURE)
    record.save(PROGRESS / PAGE, page(standings, past, drawn))
    print(f"wrote progress/{PAGE}" + (f" and progress/{PICTURE}" if drawn else ""))
    return 0


def page(standings: list[Standing], past: list[dict[str, Any]], drawn: bool) -> str:
    """The report in Markdown."""
    core = [each for each in standings if each.kata.track == "core"]
    done = [each for each in core if each.state == "passing"]
    hours = sum(each.kata.hours for each in core)
    finished = sum(each.kata.hours for each in done)
    lines = [
        "# Progress",
        "",
        f"{time.strftime('%Y-%m-%d')}: {len(done)} of {len(core)} katas passing, "
        f"{finished:g} of {hours:g} planned hours"
        + (f", begun on {past[0]['when'][:10]}." if past else "."),
        "",
        "| kata | state | rungs | first run | first green | runs | hints |",
        "| --- | --- | ---: | --- | --- | ---: | ---: |",
    ]
    lines += [row(each, [e for e in past if e["kata"] == each.kata.id]) for each in standings]
    if drawn:
        lines += ["", f"![rungs passed over time]({PICTURE})"]
    lines += ["", *system(), *made()]
    return "\n".join([*lines, "", board.next_step(standings), ""])


def row(standing: Standing, past: list[dict[str, Any]]) -> str:
    green = [each["when"][:10] for each in past if each["passed"] == each["total"] > 0]
    cells = [
        f"{standing.kata.number} {standing.kata.title}",
        board.STATES[standing.state],
        f"{standing.passed}/{standing.total}",
        past[0]["when"][:10] if past else "",
        green[0] if green else "",
        str(len(past) or ""),
        str(sum(hint.taken(standing.kata).values()) or ""),
    ]
    return f"| {' | '.join(cells)} |"


def system() -> list[str]:
    """What the whole system reached in the last `kata run`."""
    reports = sorted(RUNS.rglob("report.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(reports):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            figures = [
                ("popularity", run["baselines"]["popularity"]["ndcg@10"]),
                ("retrieval", run["retrieval"]["ndcg@10"]),
                ("with the ranking stage", run["final"]["ndcg@10"]),
            ]
            data, whose = run["data"]["name"], run.get("impl")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        lines = ["## The system", "", f"`kata run --data {data}` ({whose}), NDCG@10:", ""]
        lines += [f"- {name}: {value:.4f}" for name, value in figures if value is not None]
        return [*lines, ""]
    return []


def made() -> list[str]:
    """The decisions that were written down."""
    records = decisions.read()
    if not records:
        return []
    lines = ["## Decisions", ""]
    for each in records:
        about = ", ".join(text for text in (each.kata, each.date, each.status) if text)
        lines.append(f"- [{each.title}](decisions/{each.file})" + (f" ({about})" if about else ""))
    return [*lines, ""]


def plot(past: list[dict[str, Any]], standings: list[Standing], path: Path) -> bool:
    """Rungs passed over time, each kata a colour; False if there is nothing to draw."""
    if not past:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import dates
    from matplotlib import pyplot as plt

    katas = [each.kata for each in standings]
    best = {kata.id: 0 for kata in katas}
    when: list[datetime] = []
    passed: list[list[int]] = []
    for each in past:
        if each["kata"] in best:
            best[each["kata"]] = max(best[each["kata"]], each["passed"])
            when.append(datetime.fromisoformat(each["when"][:19]))
            passed.append(list(best.values()))
    if not when:
        return False
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    labels = [f"{kata.number} {kata.title}" for kata in katas]
    colours = plt.get_cmap("tab20").colors
    rows = [list(column) for column in zip(*passed, strict=True)]
    axes.stackplot(when, rows, labels=labels, step="post", colors=colours)
    axes.set_ylim(0, sum(each.total for each in standings))
    axes.set_ylabel("rungs passed")
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(dates.AutoDateLocator()))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
