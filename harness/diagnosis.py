"""The diagnosis: which known mistake the learner's code contains.

`fixtures/NN_name/diagnosis.json` holds what each probe of the kata (see probe.py) gives when the
code is right, and for each known mistake what the probes that it affects give. When a spec is red,
the probes run on the learner's code. A mistake is named if every probe that it affects gives what
the mistake gives; otherwise nothing is said: a wrong name is worse than none. The fixture also says
which rungs a mistake turns red: one that leaves the rung shown green is there, but elsewhere.
"""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from harness import catalog, overlay
from harness.catalog import Kata
from harness.paths import FIXTURES, ROOT
from harness.probe import Answer, Probe, agree, answer, is_number, probes_in

FILE = "diagnosis.json"
SECONDS = 20.0  # of CPU for all probes of a kata: a busy machine does not silence the diagnosis
WAITED = 60.0  # on the wall, for code that waits and computes nothing


@dataclass
class Known:
    """A mistake, or several that no probe tells apart, and what its probes give."""

    ids: list[str]
    misconception: str
    tutor: str
    gives: dict[str, Answer]  # only the probes that it affects
    rungs: list[str] = field(default_factory=list)  # that it turns red; none: not measured

    def explains(self, rung: str) -> bool:
        """Whether `rung` may be red because of it."""
        return not (rung and self.rungs) or rung in self.rungs


@dataclass
class Diagnosis:
    """What is said to the learner: `facts` go into the message, `ids` into the record."""

    ids: list[str] = field(default_factory=list)
    exact: bool = True  # nothing else is wrong that a probe can see
    facts: list[tuple[str, str]] = field(default_factory=list)


def diagnose(kata: Kata, rung: str = "") -> Diagnosis:
    """Run the probes of `kata` on the code that is installed, and name what is known.

    Args:
        rung: the red one that is shown; what does not explain it is said to be elsewhere.
    """
    path = FIXTURES / kata.id / FILE
    if not path.is_file():
        return Diagnosis()
    stored = json.loads(path.read_text(encoding="utf-8"))
    known = [Known(**mistake) for mistake in stored["mistakes"]]
    found = observe(kata)
    tolerances = {probe.name: probe.tolerance for probe in probes_of(kata)}
    named = name(stored["right"], known, found, tolerances, rung)
    if named.ids and not named.exact:  # part of it was met: by chance, if it was drawn
        again = observe(kata, seed=1)
        affected = {p for m in known if set(m.ids) & set(named.ids) for p in m.gives if found[p]}
        if any(not same(again[p] or [], found[p], tolerances[p]) for p in affected):
            return Diagnosis()
    return named


def name(
    right: dict[str, Answer],
    known: Sequence[Known],
    found: dict[str, Answer | None],
    tolerances: dict[str, float],
    rung: str = "",
) -> Diagnosis:
    """Which of the `known` mistakes explain what was `found`.

    Args:
        right, found: probe -> its answer; a probe that was not answered counts neither way.
        rung: the one that is shown.
    """
    asked = {probe: given for probe, given in found.items() if given is not None}
    red = {p for p, given in asked.items() if not same(given, right.get(p), tolerances[p])}
    fitting = []
    for mistake in known:
        affected = {probe: gives for probe, gives in mistake.gives.items() if probe in asked}
        if affected and all(
            probe in red
            and fits(asked[probe], gives, tolerances[probe], strict=weak(mistake, right))
            for probe, gives in affected.items()
        ):
            fitting.append((mistake, set(affected)))
    exact = [mistake for mistake, affected in fitting if affected == red]
    if exact:
        return spoken(exact[:1], rung, exact=True)
    strong = [(m, affected) for m, affected in fitting if not weak(m, right)]
    widest = [m for m, affected in strong if not any(affected < more for _, more in strong)]
    here = [mistake for mistake in widest if mistake.explains(rung)]
    return spoken(here[:2] or widest[:1], rung, exact=False)


def spoken(mistakes: Sequence[Known], rung: str, *, exact: bool) -> Diagnosis:
    said = Diagnosis(exact=exact)
    for mistake in mistakes:
        said.ids += mistake.ids
        if not mistake.explains(rung):
            place = mistake.rungs[0].removeprefix("test_").replace("_", " ")
            said.facts.append(("elsewhere", f"({place}) {mistake.misconception}"))
            continue
        belief = mistake.misconception if exact else f"(at least this) {mistake.misconception}"
        said.facts.append(("you assumed", belief))
        if ("in fact", mistake.tutor) not in said.facts:
            said.facts.append(("in fact", mistake.tutor))
    return said


def same(one: Answer, other: Answer | None, tolerance: float) -> bool:
    return other is not None and agree(one, other, tolerance)


def fits(given: Answer, gives: Answer, tolerance: float, *, strict: bool) -> bool:
    """`given` is what a mistake gives. Of an exception the message counts only if `strict`."""
    raised = [a[0][0] for a in (given, gives) if a and a[0][0].startswith("raises ")]
    if len(raised) == 2 and not strict:
        return raised[0] == raised[1]
    return agree(given, gives, tolerance)


def weak(mistake: Known, right: dict[str, Answer]) -> bool:
    """Whether other bugs could well give the same: no number is wrong, only kinds and texts."""
    return wrong_numbers(mistake.gives, right) < 2


def wrong_numbers(gives: dict[str, Answer], right: dict[str, Answer]) -> int:
    count = 0
    for probe, given in gives.items():
        expected = dict((head, values) for head, values in right.get(probe, []))
        for head, values in given:
            pairs = zip(values, expected.get(head, []), strict=False)
            count += sum(is_number(x) and x != y for x, y in pairs)
    return count


# --- asking ---------------------------------------------------------------------------------------


def observe(kata: Kata, seed: int = 0) -> dict[str, Answer | None]:
    """Probe -> what it gives on the code that is installed; those that hang give nothing."""
    found: dict[str, Answer | None] = {}
    nowhere = io.StringIO()  # what the learner's code prints was shown by the rungs
    with redirect_stdout(nowhere), redirect_stderr(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with alarm(SECONDS) as late:
            for probe in probes_of(kata):
                given = None if late else answer(probe, seed)
                found[probe.name] = None if late else given
    return found


def observe_into(name: str, impls: Sequence[str], path: str) -> None:
    """Write what `observe` gives for the kata called `name`, under these --impl, as JSON."""
    overlay.install(overlay.resolve(impls, ROOT))
    Path(path).write_text(json.dumps(observe(catalog.find(name))), encoding="utf-8")


def probes_of(kata: Kata) -> list[Probe]:
    file = kata.folder / "probes.py"
    return probes_in(loaded(file)) if file.is_file() else []


def loaded(file: Path) -> ModuleType:
    """The module in `file`, read anew."""
    module_name = f"katas.{file.parent.name}.{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # overlay.purge takes it out again
    spec.loader.exec_module(module)
    return module


@contextmanager
def alarm(seconds: float, waited: float = WAITED) -> Iterator[list[bool]]:
    """A list that is empty until the time is up; what runs then ends with a TimeoutError.

    Args:
        seconds: of this process' CPU time. waited: on the wall.
    """
    late: list[bool] = []
    main = threading.current_thread() is threading.main_thread()
    if not (hasattr(signal, "setitimer") and main):
        yield late
        return

    def ring(number: int, frame: object) -> None:
        late.append(True)
        raise TimeoutError(f"the probes took longer than {seconds:g} s")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, waited),
    )
    before = [signal.signal(number, ring) for number, _, _ in timers]
    for _, timer, length in timers:
        signal.setitimer(timer, length)
    try:
        yield late
    except TimeoutError:  # outside of a probe
        if not late:
            raise
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
