"""`kata culprit`: which kata's part costs the whole system what.

Each part of the learner's runs alone among the reference's, and the whole of the learner's with
each part swapped for the reference's. A part is to blame if the system is red with it alone; parts
fail together if each alone is fine and the system is red with both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from harness import catalog, overlay, system, warm
from harness.catalog import Kata
from harness.paths import REFERENCE, SRC
from harness.system import CandidateError, Finding, Job, Unfit

PRELOAD = ("transformers", "faiss", "fastapi", "uvicorn", "httpx")
PAIRS = 45  # tried at most
DOUBT = 0.4  # of the margin of one run: what is worse by that may be red over two of them
COUNTS = {"launches": "far more operations", "syncs": "more waits for the device"}


@dataclass
class Outcome:
    """How a mixture ran: what is red, in the words of the verdict."""

    reds: list[Finding] = field(default_factory=list)

    @property
    def green(self) -> bool:
        return not self.reds

    @property
    def says(self) -> str:
        """What is worst, in a few words."""
        if self.green:
            return "fine"
        worst = max(self.reds, key=weight)
        detail = worst.detail
        if "change" in detail:
            named = system.FIGURES[worst.name]
            verb = "raises" if worst.name in system.LOWER else "costs"
            return f"{verb} {abs(detail['change']):.0%} {named}"
        if "ratio" in detail:
            return f"makes {worst.name.removeprefix('speed_')} {detail['ratio']:.1f} times as slow"
        if worst.name in COUNTS:
            return f"has {COUNTS[worst.name]} in a training step"
        if worst.name == "popularity":
            return "ranks no better than popular items"
        return f"breaks the run: {worst.says}"


@dataclass
class Part:
    """What one kata's part does to the system."""

    kata: str
    alone: Outcome | None = None  # it among the reference's
    without: Outcome | None = None  # the learner's, this part swapped for the reference's


@dataclass
class Report:
    """What was found; `lines` is for people, `as_json` for programs."""

    system: Outcome
    parts: list[Part] = field(default_factory=list)
    together: list[tuple[str, ...]] = field(default_factory=list)
    rest: Outcome | None = None  # the learner's with all culprits swapped
    seconds: float = 0.0

    @property
    def culprits(self) -> list[tuple[Part, Outcome]]:
        """The parts that are red alone, and how they do so; the worst first."""
        found = [(part, part.alone) for part in self.parts if part.alone and not part.alone.green]
        return sorted(found, key=lambda each: max(map(weight, each[1].reds)), reverse=True)

    @property
    def fine(self) -> list[str]:
        """The parts that are red neither alone nor with another."""
        blamed = {p.kata for p, _ in self.culprits} | {k for group in self.together for k in group}
        return [part.kata for part in self.parts if part.kata not in blamed]

    def lines(self) -> list[str]:
        """What is said of the system, then of each part that is to blame, then of the others."""
        if self.system.green and not self.culprits:
            return ["Nothing to blame: the system is green."]
        lines = [f"The system is red: it {self.system.says}."] if not self.system.green else []
        for part, alone in self.culprits:
            number = part.kata.partition("_")[0]
            mends = part.without is not None and part.without.green
            more = "; swapped for the reference, the system is green" if mends else ""
            lines.append(f"{part.kata} {alone.says}{more}.")
            lines.append(f"  see: kata test {number}   kata guide {number}")
        for group in self.together:
            lines.append(f"{' and '.join(group)} only fail together: each alone is fine.")
        if not self.culprits and not self.together and not self.system.green:
            lines.append("No part alone and no two together explain it.")
        if self.rest is not None and not self.rest.green and self.culprits:
            lines.append(f"With them swapped it still {self.rest.says}.")
        if self.fine:
            lines.append(f"Fine: {', '.join(self.fine)}.")
        return lines

    def as_json(self) -> dict[str, Any]:
        """{"green", "says", "reds", "culprits": [{"kata", "says", "swapped_is_green"}],
        "together", "fine", "seconds", "lines"}."""
        return {
            "green": self.system.green,
            "says": self.system.says,
            "reds": [asdict(finding) for finding in self.system.reds],
            "culprits": [
                {
                    "kata": part.kata,
                    "says": alone.says,
                    "swapped_is_green": part.without.green if part.without else None,
                }
                for part, alone in self.culprits
            ],
            "together": [list(group) for group in self.together],
            "fine": self.fine,
            "seconds": round(self.seconds, 1),
            "lines": self.lines(),
        }


def weight(red: Finding) -> tuple[bool, float]:
    """How much it weighs: what cannot be judged most, then standard errors, then costs."""
    return "error" in red.detail or "rule" in red.detail, -red.detail.get("z", 0.0)


# --- mixtures -------------------------------------------------------------------------------------


def parts_of(roots: Sequence[Path]) -> list[Kata]:
    """Katas of which the learner's text differs from the reference's."""
    return [
        kata
        for kata in catalog.load()
        if any(text_of(file, roots) != text_of(file, [REFERENCE]) for file in kata.files)
    ]


def text_of(file: str, roots: Sequence[Path]) -> bytes | None:
    """Of the first root that has the file."""
    found = next((r for r in roots if (r / "recsys" / file).is_file()), None)
    return (found / "recsys" / file).read_bytes() if found else None


def mixture(folder: Path, roots: Sequence[Path], katas: Sequence[Kata]) -> list[Path]:
    """Roots with these katas' parts from `roots` and all else from the reference."""
    for kata in katas:
        for file in kata.files:
            text = text_of(file, roots)
            if text is not None:
                (folder / "recsys" / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / "recsys" / file).write_bytes(text)
    (folder / "recsys").mkdir(parents=True, exist_ok=True)
    return [folder, REFERENCE, SRC]


class Trials:
    """Runs mixtures on one job, a few at a time, each in a process of its own.

    Args:
        seeds: of the runs of a mixture: one run has to do, unless it leaves a doubt.
        what: costs to compare as well, as in `system.WORK` or "service".
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        *,
        seeds: Sequence[int] = system.SEEDS,
        what: Sequence[str] = (),
    ) -> None:
        self.job, self.folder, self.seeds, self.what = job, folder, tuple(seeds), list(what)
        self.number = itertools.count()
        self.stack = ExitStack()
        self.free: SimpleQueue[warm.Warm | None] = SimpleQueue()
        self.jobs = 1 if what else min(2, os.cpu_count() or 1)
        self.known: dict[tuple[str, ...], Outcome] = {}
        self.reference: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Trials:
        for _ in range(self.jobs):
            usable = warm.available() and not self.what
            self.free.put(self.stack.enter_context(warm.Warm(PRELOAD)) if usable else None)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def figures(self, roots: Sequence[Path], seed: int) -> dict[str, Any]:
        """The figures of one run; the cold start has one seed. Raises CandidateError or Unfit."""
        folder = self.folder / f"run-{next(self.number)}"
        folder.mkdir()
        out, answer = folder / "lists.npz", folder / "answer.json"
        request = {"job": str(self.job.path), "seed": seed, "device": "cpu"}
        request |= {"out": str(out), "cold": str(self.job.cold)}
        worker = self.free.get()
        try:
            if worker is None:
                with system.side("part", roots, folder / "side", system.plain_launch) as side:
                    side.ask("quality", **request)
            else:
                given = [[str(r) for r in roots], {"do": "quality", **request}, str(answer)]
                function = "harness.candidate:once"
                reason, _ = worker.call(function, given, answer, system.TIMEOUT)
                if reason or not answer.is_file():
                    raise CandidateError(reason or "no result", "SystemExit")
                found = json.loads(answer.read_text(encoding="utf-8"))
                if "error" in found:
                    raise CandidateError(found["said"], found["error"], found["where"])
        finally:
            self.free.put(worker)
        figures = system.judge(self.job, out, cold=True)
        shutil.rmtree(folder, ignore_errors=True)
        if seed != self.seeds[0]:
            figures.pop("cold", None)
        return figures

    def costs(self, roots: Sequence[Path], rounds: int = 3) -> list[Finding]:
        """Ratios of costs to the reference, of a run that gave lists."""
        with ExitStack() as stack:
            names = (("part", roots), ("reference", [REFERENCE, SRC]))
            sides = [
                stack.enter_context(
                    system.side(n, r, self.folder / f"side-{next(self.number)}",
                                system.plain_launch)
                )
                for n, r in names
            ]
            ran = system.run_quality(sides, self.job, self.seeds[0], "cpu", cold=False)
            served = [figures["served"] for figures in ran]
            mine, theirs = sides
            return system.speed(
                mine, theirs, self.job, "cpu", served, what=self.what, rounds=rounds
            )

    def outcome(self, roots: Sequence[Path]) -> Outcome:
        """How these roots do beside the reference; in doubt, over one seed more."""
        runs: list[dict[str, Any]] = []
        try:
            for seed in self.seeds:
                if seed not in self.reference:
                    self.reference[seed] = self.figures([REFERENCE, SRC], seed)
                runs.append(self.figures(roots, seed))
                theirs = [self.reference[each] for each in self.seeds[: len(runs)]]
                findings = system.compare(runs, theirs)
                if not in_doubt(findings):
                    break
            if self.what and all(f.good is not False for f in findings):
                findings += self.costs(roots)
        except (CandidateError, Unfit) as error:
            findings = [system.failed("runs", error)]
        return Outcome([f for f in findings if f.good is False])

    def of(self, roots: Sequence[Path], katas: Sequence[Kata]) -> Outcome:
        """How the reference does with these katas' parts; each mixture runs once."""
        key = tuple(sorted(kata.id for kata in katas))
        if key not in self.known:
            folder = self.folder / f"mix-{next(self.number)}"
            self.known[key] = self.outcome(mixture(folder, roots, katas)) if katas else Outcome()
        return self.known[key]

    def map(self, work: Callable[[Any], Outcome], cases: Sequence[Any]) -> list[Outcome]:
        """The outcomes of `work` on some cases, as many at once as there are processes."""
        with ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(work, cases))


def in_doubt(findings: Sequence[Finding]) -> bool:
    """Whether nothing is red and something so much worse that another run could make it red."""
    return all(f.good for f in findings) and any(f.detail.get("z", 0) < -DOUBT for f in findings)


# --- the search -----------------------------------------------------------------------------------


def find(trials: Trials, roots: Sequence[Path], *, both_ways: bool = True) -> Report:
    """Blame the learner's parts.

    Args:
        both_ways: swap each part for the reference's as well, not only those that are red alone.
    """
    begin = time.monotonic()
    parts = parts_of(roots)
    report = Report(trials.of(roots, parts))
    if not report.system.green:
        alone = trials.map(lambda kata: trials.of(roots, [kata]), parts)
        report.parts = [Part(kata.id, alone=o) for kata, o in zip(parts, alone, strict=True)]
        blamed = [kata for kata, o in zip(parts, alone, strict=True) if not o.green]
        tried = parts if both_ways or not blamed else blamed

        def swapped(kata: Kata) -> Outcome:
            return trials.of(roots, [other for other in parts if other != kata])

        for kata, outcome in zip(tried, trials.map(swapped, tried), strict=True):
            report.parts[parts.index(kata)].without = outcome
        if blamed:
            report.rest = trials.of(roots, [kata for kata in parts if kata not in blamed])
        else:
            report.together = pairs(trials, roots, parts, report)
    report.seconds = time.monotonic() - begin
    return report


def pairs(
    trials: Trials, roots: Sequence[Path], parts: list[Kata], report: Report
) -> list[tuple[str, ...]]:
    """Two parts that are red only together; first those without which the system is green."""
    mends = {p.kata for p in report.parts if p.without is not None and p.without.green}
    every = sorted(
        itertools.combinations(parts, 2),
        key=lambda pair: -sum(kata.id in mends for kata in pair),
    )
    for pair in every[:PAIRS]:
        if not trials.of(roots, pair).green:
            return [tuple(kata.id for kata in pair)]
    return []


def blame(
    roots: Sequence[Path],
    *,
    data: str = "synthetic",
    data_seed: int = 0,
    seeds: Sequence[int] = system.SEEDS,
    reds: Sequence[Finding] = (),
    both_ways: bool = True,
) -> Report:
    """The search on some data.

    Args:
        roots: the learner's folders, the first wins; complete.
        reds: what a verdict found red: where only costs are, they are compared as well.
    """
    with tempfile.TemporaryDirectory(prefix="kata-culprit-") as name:
        folder = Path(name).resolve()
        job = system.make_job(folder, data, data_seed)
        with Trials(job, folder, seeds=seeds, what=costs_of(reds)) as trials:
            return find(trials, list(roots), both_ways=both_ways)


def costs_of(reds: Sequence[Finding]) -> list[str]:
    """Which costs have to be compared to meet these findings again, as `Trials` has them."""
    counts = {"step"} if {f.name for f in reds} & set(COUNTS) else set()
    timed = {f.name.removeprefix("speed_") for f in reds if f.name.startswith("speed_")}
    return sorted(counts | timed)


def main(args: argparse.Namespace) -> int:
    """`kata culprit`: 0 if the system is green, 1 if not."""
    roots = [root.path for root in overlay.resolve(args.impl or ["mine"], Path.cwd())]
    if not args.json:
        print("Runs the system with each part swapped in turn: a few minutes.", flush=True)
    reds = [Finding(f"speed_{what}", "", False) for what in args.cost or []]
    seeds = (args.seed, args.seed + 1)
    report = blame(roots, data=args.data, seeds=seeds, reds=reds, both_ways=not args.quick)
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        print("\n".join(report.lines()))
    return 0 if report.system.green and not report.culprits else 1
