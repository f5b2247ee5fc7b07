"""What the integration kata makes of mistakes in one module: writes docs/integration.md.

Each mistake lies among the reference's parts and is judged as `kata gate` judges: what it moves,
the verdict, and by which rung. Then it lies among right parts that are not the reference's, and
`kata culprit` has to say which of them it is. A row is kept in results.json when it is done; the
next call goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness import catalog, culprit, system
from harness.paths import REFERENCE, ROOT, SRC
from reference_tests.integration import costs
from reference_tests.strength import catalogue

RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = ROOT / "docs" / "integration.md"
# Those that one would expect to matter to a system, and for each kata one or two that need not.
MISTAKES = {
    "01_embedding_table": (
        *("lookup-detached", "init-std-one", "one-hot-lookup", "gradient-by-frequency"),
        *("padding-pooled", "default-is-sum", "asserts-for-errors"),
    ),
    "02_tower": (
        *("item-tower-detached", "normalize-batch-axis", "not-normalised", "last-item-at-the-end"),
        *("temperature-not-learned", "dropout-in-eval", "no-residual", "loop-over-rows"),
    ),
    "03_contrastive_loss": (
        *("log-q-added", "users-as-candidates", "no-accidental-mask", "log-q-before-temperature"),
        *("temperature-multiplied", "softmax-twice", "weights-squared", "loop-over-rows"),
    ),
    "04_cross_layer": (
        *("softmax-over-users", "loss-of-detached", "no-residual", "listwise-binary"),
        *("dense-standardised", "dropout-always", "weights-eps"),
    ),
    "05_training_loop": (
        *("trn-no-zero-grad", "no-shuffle", "loss-read-in-each-step", "clear-each-micro-batch"),
        *("rate-constant", "lower-is-better", "not-fused", "no-fsync"),
    ),
    "06_ndcg": (
        *("worst-items-first", "seen-items-stay", "mask-loop-over-users", "list-ndcg-log-rank"),
        *("last-chunk-dropped", "one-user-at-a-time", "auc-ties-win"),
    ),
    "08_llm_pooling": (
        *("order-not-restored", "mean-over-padding", "one-text-at-a-time"),
        *("normalised-over-the-batch", "padded-to-max-length", "not-centred", "offset-penalised"),
    ),
    "09_serving": (
        *("scores-sorted-ids-not", "rows-returned-as-ids", "one-user-after-the-other"),
        *("seen-items-returned", "no-room-for-seen", "waits-for-company", "no-retry-after"),
    ),
    "07_compile": ("eager-is-the-default", "gradients-are-cleared"),
}
MIXES = ("mix 1", "mix 2", "mix 3")  # of drawn alternates that are green alone
GROUPS = {  # what is red -> the rung of test_system.py that says so
    "popularity": "beats popular items",
    **dict.fromkeys(system.FIGURES, "keeps up"),
    **dict.fromkeys([f"speed_{name}" for name in (*system.WORK, system.SERVICE)], "costs"),
    **dict.fromkeys(("launches", "syncs"), "operations and waits"),
}
SHORT = {
    "final": "final NDCG@10",
    "retrieval": "retrieval NDCG@10",
    "recall": "recall",
    "logloss": "log loss",
    "cold": "cold recall@10",
}
FUTURE = "from __future__ import annotations\n"
COSTS = ("costs", "operations and waits")
Z = 1.96  # of an interval of 95 %
WORTH = 1.25  # times the reference's cost, from where it is said


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="no new row after them")
    parser.add_argument("--again", action="append", default=[], metavar="ROW", help="or a part")
    parser.add_argument("--only", default="", metavar="ROW", help="or a part, of those missing")
    parser.add_argument("--render", action="store_true", help="write the page only")


def main(args: argparse.Namespace) -> int:
    """Measure what is missing, write the page; 1 if rows are missing still."""
    rows = stored()
    begin = time.monotonic()
    for name in [name for name in rows if any(part in name for part in args.again)]:
        del rows[name]
    with ExitStack() as stack:
        judge = None
        while not args.render and time.monotonic() - begin < 60 * args.minutes:
            name = next((name for name in missing(rows) if args.only in name), None)
            if name is None:
                break
            judge = judge or stack.enter_context(Judge(rows))
            rows[name] = judge.row(name)
            keep(rows)
            print(f"{name}: {rows[name]['verdict']}; {rows[name]['culprit']}", flush=True)
    DOCUMENT.write_text(page(rows), encoding="utf-8")
    left = missing(rows)
    print(f"{len(rows)} rows, {len(left)} missing", flush=True)
    return 1 if left else 0


def names() -> list[str]:
    """All rows, in their order."""
    rows = [[f"{kata}/{mistake}" for mistake in some] for kata, some in MISTAKES.items()]
    turns = zip_longest(*rows)  # of each kata in turn: a table that is not finished shows all
    single = [f"{kata.id}:{each.id}" for kata in core() for each in catalogue.alternates_of(kata)]
    return ["reference", *single, *MIXES, *(name for turn in turns for name in turn if name)]


def missing(rows: Mapping[str, Any]) -> list[str]:
    """What is to be measured next, in order: of alternates alone only those that mixes draw."""
    drawn = {found for name in MIXES for found in mix(name, rows).items()}
    single = [name for name in names() if tuple(name.split(":")) in drawn and name not in rows]
    return single + [name for name in names() if ":" not in name and name not in rows]


def core() -> list[catalog.Kata]:
    """The katas of which the whole consists."""
    return [kata for kata in catalog.load() if kata.track == "core"]


def stored() -> dict[str, Any]:
    """The rows that are measured, by name."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def keep(rows: dict[str, Any]) -> None:
    """Write the rows, in their order and without those that are no longer asked for."""
    kept = {name: rows[name] for name in names() if name in rows}
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")


# --- measuring ------------------------------------------------------------------------------------


class Judge:
    """Verdicts and culprits, with what all rows share made once.

    Args:
        rows: those that are measured already; mixes are drawn by them.
    """

    def __init__(self, rows: Mapping[str, Any]) -> None:
        self.rows = rows

    def __enter__(self) -> Judge:
        self.place = tempfile.TemporaryDirectory(prefix="kata-integration-")
        self.folder = Path(self.place.name).resolve()
        self.job = system.make_job(self.folder)
        self.stack = ExitStack()
        self.trials = self.stack.enter_context(culprit.Trials(self.job, self.folder))
        self.reference = self.runs([REFERENCE, SRC])
        self.right: dict[tuple[str, ...], culprit.Outcome] = {}
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
        self.place.cleanup()

    def runs(self, roots: Sequence[Path]) -> list[dict[str, Any]]:
        """Figures of both seeds."""
        return [self.trials.figures(roots, seed) for seed in system.SEEDS]

    def verdict(self, roots: Sequence[Path]) -> system.Verdict:
        """What `system.verdict` finds; the reference's figures are not made anew for each."""
        begin, made = time.monotonic(), system.Verdict("synthetic", list(system.SEEDS), "cpu")
        try:
            made.findings += system.compare(self.runs(roots), self.reference)
            if made.green:
                place = Path(tempfile.mkdtemp(dir=self.folder))
                what = [*system.WORK, system.SERVICE]
                with culprit.Trials(self.job, place, what=what) as trials:
                    made.findings += trials.costs(roots, rounds=system.ROUNDS)
        except (system.CandidateError, system.Unfit) as error:
            made.findings.append(system.failed("runs", error))
        made.seconds = time.monotonic() - begin
        return made

    def row(self, name: str) -> dict[str, Any]:
        """Measure a row: see `names` for what it is of; what it holds is written below."""
        kata, _, mistake = name.partition("/")
        alternates: dict[str, str] = {}
        roots: list[Path] = []
        if mistake:
            text = mistake_of(kata, mistake).texts
            roots = [catalogue.lay(text, self.folder / name.replace("/", "-"))]
        elif name != "reference":
            alternates = dict([name.split(":")]) if ":" in name else mix(name, self.rows)
            roots = self.roots_of(alternates)
        whole = [*roots, REFERENCE, SRC]
        one = len(roots) == 1
        found = self.verdict(whole) if one else system.verdict(whole)
        named = self.culprit(kata, roots, found) if mistake and not found.green else None
        return {
            "alternates": alternates,
            "verdict": "green" if found.green else "red",
            "reds": [finding.name for finding in found.reds],
            "says": found.reds[0].says if found.reds else "",
            "figures": {
                f.name: [round(f.detail[key], 5) for key in ("change", "value", "reference", "z")]
                for f in found.findings if "margin" in f.detail
            },
            "margins": {
                f.name: round(f.detail["margin"] / f.detail["reference"], 5)
                for f in found.findings if "margin" in f.detail
            },
            "costs": {
                f.name.removeprefix("speed_"): round(f.detail["ratio"], 3)
                for f in found.findings if "ratio" in f.detail
            },
            "culprit": named,
            "seconds": round(found.seconds, 1),
            "made": f"{date.today().isoformat()}, Python {platform.python_version()}",
        }  # fmt: skip

    def roots_of(self, alternates: dict[str, str]) -> list[Path]:
        """Folders of alternates, made whole: some leave out what every stub keeps."""
        roots = []
        for kata, name in alternates.items():
            root = self.folder / "alternates" / kata / name
            if not root.is_dir():
                found = {each.id: each for each in catalogue.alternates_of(catalog.find(kata))}
                catalogue.lay(completed(catalog.find(kata), found[name]), root)
            roots.append(root)
        return roots

    def culprit(self, kata: str, roots: list[Path], found: system.Verdict) -> dict[str, Any]:
        """Whom `kata culprit` blames where the other parts are alternates, and its words.

        All are, unless only costs are red: each trial takes long then, and one other part has to
        do.
        """
        others = mix("mix 1", self.rows)
        others.pop(kata, None)
        with ExitStack() as stack:
            if all(GROUPS.get(finding.name) in COSTS for finding in found.reds):
                others = dict([random.Random(kata).choice(sorted(others.items()))])
                place = Path(tempfile.mkdtemp(dir=self.folder))
                what = culprit.costs_of(found.reds)
                trials = stack.enter_context(culprit.Trials(self.job, place, what=what))
            else:
                trials = self.trials
                trials.known = {key: o for key, o in self.right.items() if key != (kata,)}
            whole = [*roots, *self.roots_of(others), REFERENCE, SRC]
            report = culprit.find(trials, whole, both_ways=False)
        if trials is self.trials:  # what right parts do alone is the same for each mistake
            single = {key: o for key, o in trials.known.items() if len(key) == 1}
            self.right |= {key: o for key, o in single.items() if key != (kata,)}
        return {
            "others": len(others),
            "named": [part.kata for part, _ in report.culprits],
            "together": [list(group) for group in report.together],
            "says": [f"{part.kata} {alone.says}" for part, alone in report.culprits],
        }


def mistake_of(kata: str, mistake: str) -> catalogue.Mistake:
    """The catalogue's entry. Raises catalogue.CatalogueError."""
    return catalogue.read(catalog.find(kata), catalogue.MISTAKES / kata / f"{mistake}.toml")


def completed(kata: catalog.Kata, alternate: catalogue.Alternate) -> dict[str, str]:
    """The files of an alternate; below each the reference's, where it lacks a kept name."""
    texts = {}
    for file, text in alternate.texts.items():
        kept = [name for name in kata.keep.get(file, ()) if "." not in name]
        if any(not re.search(rf"^(def|class) {name}\b", text, re.M) for name in kept):
            reference = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
            text = reference + "\n\n" + text.replace(FUTURE, "")
        texts[file] = text
    return texts


def mix(name: str, rows: Mapping[str, Any]) -> dict[str, str]:
    """For each core kata the first alternate in a drawn order that is not red alone."""
    drawn = {}
    for kata in core():
        some = [each.id for each in catalogue.alternates_of(kata)]
        some = random.Random(f"{name} {kata.id}").sample(some, len(some))
        red = {each for each in some if rows.get(f"{kata.id}:{each}", {}).get("verdict") == "red"}
        drawn[kata.id] = next(each for each in some if each not in red)
    return drawn


# --- the page -------------------------------------------------------------------------------------

HEAD = """# What the integration kata sees

Written by `python -m reference_tests.integration table`; do not edit. It goes on with the rows that
are missing in `reference_tests/integration/results.json`; `--again ROW` measures one again.

Each row is a mistake in one module, from the katas' catalogue, among the reference's other parts:
the system is judged beside the reference on generated data, as `kata gate` and the last rungs of
kata 10 do. **Moved** are the figures whose 95 % interval (in brackets; two right runs differ so by
their seeds alone) leaves out 0, and costs from {dear} times the reference's. A row is red where a
figure is worse by {z:g} standard errors, a cost is above {ratio} times, or the system does not run.
**Culprit** is whom `kata culprit` names where the mistake lies among alternates: all other parts
are right, and none is the reference's. (Where only a cost is red: beside one alternate.)
"""
SILENT = """
## What nothing shows

{count} of the {all} mistakes are green here: they change no figure beyond chance on this data, or
the pipeline does not call what they spoil. Each is red in the spec of its own kata, and the gate
does not run those: a green system does not say that all its parts are right.

{rows}
"""


RIGHT = """
## Right systems

Alternates are right by their kata's spec, and were not written to be fast. Of {all} that were
drawn, each among the reference's parts, none is red for a figure and {red} for what they cost,
which this kata asks and the others do not: who writes a right and slow part has to mend that here.

"""
MIXED = """
A mix has in each module an alternate, drawn among those that are green alone.

"""


def page(rows: dict[str, Any]) -> str:
    """docs/integration.md, of these rows."""
    mistakes = {name: rows[name] for name in sorted(rows) if "/" in name}
    red = {name: row for name, row in mistakes.items() if row["verdict"] == "red"}
    text = HEAD.format(dear=WORTH, ratio=system.RATIO, z=margins()["z"])
    text += f"\n{len(red)} of {len(mistakes)} are red; {who(red)}"
    if left := len(missing(rows)):
        text += f"\n{left} rows are not measured yet."
    text += "\n\n"
    text += "| kata | mistake | moved | verdict | culprit |\n| --- | --- | --- | --- | --- |\n"
    text += "".join(line(name, row) for name, row in red.items())
    green = [name for name in mistakes if name not in red]
    silent = "".join(line(name, mistakes[name], culprit=False) for name in green)
    head = "| kata | mistake | moved |\n| --- | --- | --- |\n"
    text += SILENT.format(count=len(green), all=len(mistakes), rows=(head + silent).strip())
    return text + right_systems(rows) + chance() + times(rows)


def who(red: dict[str, Any]) -> str:
    """How often the right part is named, and how often another is blamed."""
    asked = {name: row["culprit"]["named"] for name, row in red.items() if row["culprit"]}
    right = [name for name, named in asked.items() if named == [name.partition("/")[0]]]
    wrong = [name for name, named in asked.items() if set(named) - {name.partition("/")[0]}]
    said = f"of {len(right)} of these the culprit is named, and it alone"
    return f"{said}; another part is blamed in {len(wrong)}."


def line(name: str, row: dict[str, Any], culprit: bool = True) -> str:
    """A mistake's row of the table."""
    kata, _, mistake = name.partition("/")
    belief = mistake_of(kata, mistake).misconception.replace("|", "\\|")
    cells = [kata[:2], f"{mistake}: {belief}", "; ".join(moved(row)) or "nothing"]
    if culprit:
        rungs = {GROUPS.get(red, "runs, lists are honest") for red in row["reds"]}
        cells.append("red: " + ", ".join(sorted(rungs)))
        found = row["culprit"] or {"says": ["not asked yet"], "together": []}
        words = found["together"] and [" with ".join(found["together"][0]) + ", only together"]
        cells.append("; ".join(found["says"] or words or ["nobody"]).replace("|", "\\|"))
    return f"| {' | '.join(cells)} |\n"


def moved(row: dict[str, Any]) -> list[str]:
    """The figures that are not what the reference's are, and by how much."""
    found = []
    for name, (change, *_) in row["figures"].items():
        half = row["margins"][name] * Z / margins()["z"]
        if abs(change) > half:
            interval = f"[{change - half:+.0%}, {change + half:+.0%}]"
            found.append(f"{SHORT[name]} {change:+.0%} {interval}")
    found += [f"{name} {ratio:.1f}×" for name, ratio in row["costs"].items() if ratio >= WORTH]
    known = bool(row["figures"]) and not set(row["reds"]) & {"launches", "syncs"}
    return found if known else [*found, row["says"].replace("|", "\\|")]


def margins() -> dict[str, Any]:
    """What `python -m reference_tests.integration margins` measured."""
    return json.loads(system.MARGINS.read_text(encoding="utf-8"))


def right_systems(rows: dict[str, Any]) -> str:
    """What alternates alone, and mixes of them, are to the integration kata."""
    single = {name: row for name, row in rows.items() if ":" in name}
    red = {name: row for name, row in single.items() if row["verdict"] == "red"}
    text = RIGHT.format(red=len(red), all=len(single))
    text += "| kata | alternate | moved |\n| --- | --- | --- |\n"
    for name, row in sorted(red.items()):
        kata, _, alternate = name.partition(":")
        text += f"| {kata[:2]} | {alternate} | {'; '.join(moved(row))} |\n"
    text += MIXED
    text += "| system | moved | dearest | verdict |\n| --- | --- | --- | --- |\n"
    for name in ("reference", *MIXES):
        if name not in rows:
            continue
        row = rows[name]
        parts = ", ".join(f"{kata[:2]} {which}" for kata, which in row["alternates"].items())
        what, ratio = max(row["costs"].items(), key=lambda each: each[1], default=("-", 0.0))
        cells = [f"{name}: {parts}" if parts else f"the {name} against itself"]
        cells += ["; ".join(moved(row)) or "nothing", f"{what} {ratio:.2f}×", row["verdict"]]
        text += f"| {' | '.join(cells)} |\n"
    return text


def chance() -> str:
    """How often right systems are red by chance."""
    found = margins()
    alarms = found["false_alarms"]
    low, high = alarms["interval_95"]
    distances = [z for each in alarms["standard_errors"].values() for z in each]
    return f"""
## False alarms

`{found["made_by"]}`: in each of {alarms["worlds"]}
generated worlds four runs of the reference, two against two in each of three ways, judged with the
margins of other worlds ({alarms["folds"]} folds).
{alarms["red"]} of {alarms["verdicts"]} verdicts were red, counting either pair as the learner's;
95 % interval {low:.1%} to {high:.1%}. The largest of {len(distances)} distances was
{max(map(abs, distances)):.1f} standard errors; red begins at {found["z"]:g}.

{costly()}"""


def costly() -> str:
    """How often the reference is red for its costs, beside itself."""
    found = json.loads(costs.RESULTS.read_text(encoding="utf-8"))
    low, high = found["interval_95"]
    largest = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["largest"].items())
    idle, busy = found["load"]
    return f"""`{found["made_by"]}`: the reference timed beside
itself, on {found["cores"]} cores with a load of {idle:g} to {busy:g}, {found["date"]}.
{found["red"]} of {found["verdicts"]} verdicts were red, 95 % interval {low:.1%} to {high:.1%}.
The largest ratios: {largest}. Red begins above {system.RATIO:g},
and what is up to twice that is measured {system.MORE} times as often before.
"""


def times(rows: dict[str, Any]) -> str:
    """How long a verdict takes, and when it was measured."""
    whole = [name for name in ("reference", *MIXES) if name in rows]
    seconds = sorted(rows[name]["seconds"] for name in whole)
    made = sorted({row["made"] for row in rows.values()})
    if not seconds:
        return ""
    return f"""
## Times

The verdicts of right systems, learner and reference side by side with all costs, took
{seconds[0]:.0f} to {seconds[-1]:.0f} s on two cores that other work shared. {"; ".join(made)}.
"""
