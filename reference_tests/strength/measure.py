"""How strong a kata's spec is: everything known is tried against it, in warm forks.

The reference must pass and the stub fail on every rung; every mistake must be rejected, and named
by the diagnosis; every alternate accepted; mutants of the reference killed.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from harness import diagnosis, message, stubs
from harness.catalog import Kata, digest, tomllib
from harness.paths import FIXTURES, REFERENCE, REFERENCE_TESTS, STATE
from harness.probe import Answer, agree
from harness.runner import KataResult
from harness.warm import Warm
from reference_tests.strength import catalogue, mutants
from reference_tests.strength.catalogue import Alternate, CatalogueError, Mistake

TRANSCRIPTS = REFERENCE_TESTS / "transcripts"
EQUIVALENT = REFERENCE_TESTS / "mutants"
MUTANTS = 80  # tried of each kata; all of them with --all-mutants
SCREEN = 24  # lines of a message

Case = TypeVar("Case")
Outcome = TypeVar("Outcome")


@dataclass
class Strength:
    """What was found for one kata; `troubles` says in words what is not as it should be."""

    kata: str
    rungs: int = 0
    seconds: float = 0.0  # of a warm run of the reference
    mistakes: int = 0
    rejected: int = 0
    named: int = 0
    misnamed: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    alternates: int = 0
    accepted: int = 0
    mutants: int = 0  # without the equivalent ones
    killed: int = 0
    equivalent: int = 0
    survivors: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


class Workers:
    """A few warm processes, and cases that are handed to whichever is free."""

    def __init__(self, jobs: int, preload: Iterable[str] = ()) -> None:
        self.jobs = jobs
        self.preload = tuple(preload)
        self.stack = ExitStack()
        self.free: SimpleQueue[Warm] = SimpleQueue()

    def __enter__(self) -> Workers:
        for _ in range(self.jobs):
            self.free.put(self.stack.enter_context(Warm(self.preload)))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def map(self, work: Callable[[Warm, Case], Outcome], cases: list[Case]) -> Iterator[Outcome]:
        def one(case: Case) -> Outcome:
            warm = self.free.get()
            try:
                return work(warm, case)
            finally:
                self.free.put(warm)

        with ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(one, cases)


# --- one kata -------------------------------------------------------------------------------------


@dataclass
class Wanted:
    """Which parts are measured, and whether the generated files are written."""

    mistakes: bool = True
    alternates: bool = True
    mutants: bool = True
    only: tuple[str, ...] = ()  # ids
    all_mutants: bool = False
    write: bool = False
    tell: Callable[[str], None] = print

    def chosen(self, cases: list[Case]) -> list[Case]:
        return [case for case in cases if not self.only or case.id in self.only]  # type: ignore[attr-defined]


def measure(kata: Kata, workers: Workers, wanted: Wanted) -> Strength:
    """Everything about one kata.

    Raises:
        CatalogueError: an entry of the catalogue is malformed.
    """
    found = Strength(kata.id, rungs=len(kata.rungs))
    mistakes = catalogue.mistakes_of(kata)
    alternates = catalogue.alternates_of(kata)
    work = STATE / "strength" / kata.id
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    reference_and_stub(kata, workers, found, work)
    if found.troubles:
        return found  # nothing else means anything
    if wanted.mistakes:
        try_mistakes(kata, workers, wanted, found, mistakes, alternates, work)
    if wanted.alternates:
        try_alternates(kata, workers, wanted, found, alternates, work)
    if wanted.mutants:
        try_mutants(kata, workers, wanted, found, work)
    return found


def reference_and_stub(kata: Kata, workers: Workers, found: Strength, work: Path) -> None:
    stub = catalogue.lay({file: stubs.generate(kata, file) for file in kata.files}, work / "stub")

    def run(warm: Warm, impls: list[str]) -> KataResult:
        return warm.run(kata, impls)

    green, red = workers.map(run, [["reference"], [str(stub), "reference"]])
    found.seconds = round(green.seconds, 2)
    if not green.ok:
        found.troubles.append(f"the reference is red: {first_line(green)}")
    passed = [rung for rung, outcome in red.rungs.items() if outcome == "passed"]
    if passed or red.reason:
        found.troubles.append(f"the stub passes {', '.join(passed)}{red.reason}")


def laid(entries: list[Mistake] | list[Alternate], work: Path) -> dict[str, Path]:
    """A folder for `--impl` of each entry."""
    return {each.id: catalogue.lay(each.texts, work / each.id) for each in entries}


def try_mistakes(
    kata: Kata,
    workers: Workers,
    wanted: Wanted,
    found: Strength,
    mistakes: list[Mistake],
    alternates: list[Alternate],
    work: Path,
) -> None:
    roots = laid(mistakes, work / "mistakes")
    if not wanted.only:
        right = laid(alternates, work / "alternates")
        signatures(kata, workers, wanted, found, mistakes, roots, right)
    cases = wanted.chosen(mistakes)

    def run(warm: Warm, mistake: Mistake) -> KataResult:
        return warm.run(kata, [str(roots[mistake.id]), "reference"], transcript=True)

    screens: dict[str, str] = {}
    reds: dict[str, list[str]] = {}
    for mistake, result in zip(cases, workers.map(run, cases), strict=True):
        found.mistakes += 1
        reds[mistake.id] = [rung for rung, state in result.rungs.items() if state != "passed"]
        verdict = "rejected"
        if result.ok:
            verdict = "ACCEPTED"
            found.troubles.append(f"the spec accepts the mistake {mistake.id}")
        else:
            found.rejected += 1
            ids = result.diagnosis.ids
            if mistake.id in ids:
                found.named += 1
                verdict += ", named" if result.diagnosis.exact else ", named (at least)"
            elif ids:
                found.misnamed.append(f"{mistake.id} as {', '.join(ids)}")
                verdict += f", MISNAMED {', '.join(ids)}"
            else:
                found.unnamed.append(mistake.id)
                verdict += ", not named" + (f" ({mistake.unnamed})" if mistake.unnamed else "")
            screens[mistake.id] = screen_of(result)
            lines = screens[mistake.id].count("\n") + 1
            if lines > SCREEN:
                found.troubles.append(f"the message of {mistake.id} has {lines} lines of {SCREEN}")
            if result.reason:
                verdict += f"; no result: {result.reason}"
        red = len(result.rungs) - result.passed
        wanted.tell(f"  mistake    {mistake.id}: {verdict}; {red} red, {result.seconds:.1f} s")
        if wanted.only and not result.ok:
            wanted.tell(screens[mistake.id])
    if not wanted.only:
        located(kata, wanted, found, reds)
        transcripts(kata, wanted, found, screens)


def try_alternates(
    kata: Kata,
    workers: Workers,
    wanted: Wanted,
    found: Strength,
    alternates: list[Alternate],
    work: Path,
) -> None:
    cases = wanted.chosen(alternates)
    roots = laid(cases, work / "alternates")

    def run(warm: Warm, alternate: Alternate) -> KataResult:
        return warm.run(kata, [str(roots[alternate.id]), "reference"], transcript=True)

    for alternate, result in zip(cases, workers.map(run, cases), strict=True):
        found.alternates += 1
        found.accepted += result.ok
        verdict = "accepted" if result.ok else "REJECTED"
        wanted.tell(f"  alternate  {alternate.id}: {verdict}, {result.seconds:.1f} s")
        if not result.ok:
            found.troubles.append(f"the spec rejects the alternate {alternate.id}")
            wanted.tell(screen_of(result))


def try_mutants(
    kata: Kata, workers: Workers, wanted: Wanted, found: Strength, work: Path
) -> None:
    every = []
    for file in kata.files:
        source = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
        every += mutants.mutants_of(file, source, stubs.generate(kata, file))
    equivalent = equivalents(kata)
    gone = sorted(set(equivalent) - {mutant.id for mutant in every})
    found.troubles += [f"{kata.id}: a mutant listed as equivalent is none: {each}" for each in gone]
    chosen = every if wanted.all_mutants or wanted.only else mutants.select(every, MUTANTS)
    cases = wanted.chosen(chosen)
    roots = {
        mutant.id: catalogue.lay({mutant.file: mutant.text}, work / "mutants" / str(i))
        for i, mutant in enumerate(cases)
    }

    def run(warm: Warm, mutant: mutants.Mutant) -> KataResult:
        timeout = 30 + 10 * found.seconds  # a mutant may well loop for ever
        impls = [str(roots[mutant.id]), "reference"]
        return warm.run(kata, impls, options=["-x"], timeout=timeout)

    for mutant, result in zip(cases, workers.map(run, cases), strict=True):
        survived = result.ok
        if mutant.id in equivalent:
            found.equivalent += 1
            if not survived:
                found.troubles.append(f"listed as equivalent, but killed: {mutant.id}")
            continue
        found.mutants += 1
        found.killed += not survived
        if survived:
            found.survivors.append(mutant.id)
            wanted.tell(f"  mutant     SURVIVED {mutant.file}:{mutant.line} {mutant.id}")


def equivalents(kata: Kata) -> dict[str, str]:
    """Mutant -> why no input of the contract tells it from the reference."""
    path = EQUIVALENT / f"{kata.id}.toml"
    if not path.is_file():
        return {}
    listed = tomllib.loads(path.read_text(encoding="utf-8")).get("equivalent", [])
    for each in listed:
        if not each.get("mutant") or not each.get("reason"):
            raise CatalogueError(f"{catalogue.shown(path)}: each has `mutant` and `reason`")
    return {each["mutant"]: each["reason"] for each in listed}


# --- the diagnosis' fixture -----------------------------------------------------------------------


def signatures(
    kata: Kata,
    workers: Workers,
    wanted: Wanted,
    found: Strength,
    mistakes: list[Mistake],
    roots: dict[str, Path],
    alternates: dict[str, Path],
) -> None:
    """What the probes give for the reference, each mistake and each alternate."""
    tolerances = {probe.name: probe.tolerance for probe in diagnosis.probes_of(kata)}
    if not tolerances:
        found.troubles.append("there is no probes.py: no mistake can be named")
        return
    cases: list[list[str]] = [["reference"]]
    cases += [[str(roots[mistake.id]), "reference"] for mistake in mistakes]
    cases += [[str(root), "reference"] for root in alternates.values()]

    def run(warm: Warm, impls: list[str]) -> dict[str, Answer | None]:
        with tempfile.TemporaryDirectory(prefix="kata-") as folder:
            results = Path(folder) / "answers.json"
            function = "harness.diagnosis:observe_into"
            reason, output = warm.call(function, [kata.id, impls, str(results)], results, 60)
            if reason or not results.is_file():
                return {}  # it took the process with it: nothing can be learnt from that
            return json.loads(results.read_text(encoding="utf-8"))

    right, *others = workers.map(run, cases)
    if not right or None in right.values():
        found.troubles.append("the probes do not run on the reference")
        return
    raised = [name for name, given in right.items() if given[0][0].startswith("raises")]
    found.troubles += [f"probe {name} raises on the reference: {right[name]}" for name in raised]
    for alternate, answers in zip(alternates, others[len(mistakes) :], strict=True):
        for name in differing(right, answers, tolerances):
            found.troubles.append(f"probe {name} takes the alternate {alternate} for wrong")
    known: list[dict[str, Any]] = []
    for mistake, answers in zip(mistakes, others, strict=False):
        gives = {name: answers[name] for name in differing(right, answers, tolerances)}
        if not gives:
            continue
        twin = next((k for k in known if alike(k["gives"], gives, tolerances)), None)
        if twin is not None:
            twin["ids"].append(mistake.id)
            wanted.tell(f"  diagnosis  {mistake.id} shares a name with {twin['ids'][0]}")
        else:
            words = {"misconception": mistake.misconception, "tutor": mistake.tutor}
            known.append({"ids": [mistake.id], **words, "gives": gives})
    path = FIXTURES / kata.id / diagnosis.FILE
    if wanted.write:
        made = {"made_by": f"kata check --strength {kata.number} --write", "right": right}
        path.write_text(laid_out(made | {"mistakes": known}), encoding="utf-8")
    elif not path.is_file():
        found.troubles.append(f"{catalogue.shown(path)} is missing: add --write")
    else:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not current(stored, right, known, tolerances):
            found.troubles.append(f"{catalogue.shown(path)} is not current: add --write")


def located(kata: Kata, wanted: Wanted, found: Strength, reds: dict[str, list[str]]) -> None:
    """The fixture says which rungs each mistake turns red, so that it is named where it shows."""
    path = FIXTURES / kata.id / diagnosis.FILE
    if not path.is_file():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    for known in stored["mistakes"]:
        of_each = [reds.get(each, []) for each in known["ids"]]  # a name that several share
        rungs = [rung.name for rung in kata.rungs if any(rung.name in some for some in of_each)]
        if not wanted.write and known.get("rungs", rungs) != rungs:
            found.troubles.append(f"{known['ids'][0]} turns {', '.join(rungs)} red: add --write")
        known["rungs"] = rungs
    if wanted.write:
        path.write_text(laid_out(stored), encoding="utf-8")


def differing(
    right: dict[str, Answer], answers: dict[str, Any], tolerances: dict[str, float]
) -> list[str]:
    return [
        name
        for name, given in answers.items()
        if given is not None and not agree(given, right[name], tolerances[name])
    ]


def alike(
    one: dict[str, Answer], other: dict[str, Answer], tolerances: dict[str, float]
) -> bool:
    return set(one) == set(other) and all(
        agree(one[name], other[name], tolerances[name]) for name in one
    )


def current(
    stored: dict[str, Any],
    right: dict[str, Answer],
    known: list[dict[str, Any]],
    tolerances: dict[str, float],
) -> bool:
    """Whether the fixture says the same, numbers within the tolerance."""
    words = ("ids", "misconception", "tutor")
    return (
        alike(stored["right"], right, tolerances)
        and len(stored["mistakes"]) == len(known)
        and all(
            all(old[key] == new[key] for key in words)
            and alike(old["gives"], new["gives"], tolerances)
            for old, new in zip(stored["mistakes"], known, strict=True)
        )
    )


def laid_out(table: dict[str, Any]) -> str:
    """JSON with a line for each answer, so that a change can be read."""
    text = json.dumps(table, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    return re.sub(r"\[\s+(\"[^\"]*\"),\s+(\[[^\]]*\])\s+\]", r"[\1, \2]", text) + "\n"


# --- the messages ---------------------------------------------------------------------------------


def screen_of(result: KataResult) -> str:
    if not result.reds:
        return f"no result: {result.reason}"
    return "\n".join(message.screen(result.reds[0], result.reds[1:]))


def first_line(result: KataResult) -> str:
    return result.reason or (result.reds[0].title if result.reds else "no reds")


def transcripts(kata: Kata, wanted: Wanted, found: Strength, screens: dict[str, str]) -> None:
    """Hold the messages against the committed ones. Numbers may differ: machines do."""
    path = TRANSCRIPTS / f"{kata.id}.txt"
    text = "".join(f"{'=' * 20} {name}\n{screen}\n\n" for name, screen in screens.items())
    if wanted.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    stored = path.read_text(encoding="utf-8") if path.is_file() else ""
    if without_numbers(stored) != without_numbers(text):
        found.troubles.append(
            f"messages are not those of {catalogue.shown(path)}: add --write and read the diff"
        )


def without_numbers(text: str) -> str:
    """The text's words: numbers, where they break lines and which is the worst are left out."""
    text = re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?|\b(nan|inf)\b", "#", text)
    return re.sub(r", worst at \[[#, ]*\]", "", " ".join(text.split()))


# --- what a result depends on ---------------------------------------------------------------------


def digest_of(kata: Kata) -> str:
    """A digest of all that the strength of a kata depends on, but the harness and the versions."""
    folders = [kata.folder, FIXTURES / kata.id]
    folders += [catalogue.MISTAKES / kata.id, catalogue.ALTERNATES / kata.id]
    files = [file for folder in folders for file in folder.rglob("*")]
    files += [EQUIVALENT / f"{kata.id}.toml", TRANSCRIPTS / f"{kata.id}.txt"]
    files += [REFERENCE / "recsys" / file for file in kata.files]
    lines = [
        f"{file.relative_to(REFERENCE_TESTS.parent).as_posix()} {digest(file.read_bytes())}"
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    ]
    return digest("\n".join(sorted(lines)))


def timed(function: Callable[[], Outcome]) -> tuple[Outcome, float]:
    begin = time.monotonic()
    return function(), time.monotonic() - begin
