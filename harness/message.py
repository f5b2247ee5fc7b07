"""The message of a red rung: one screen that says what was called, what came back, what to do.

`explain` turns an exception into facts; `screen` lays them out. No frame of torch, pytest or the
harness is shown, only the learner's own line.
"""

from __future__ import annotations

import ast
import linecache
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import overlay, settings
from harness.calls import seen
from harness.catalog import Kata
from harness.paths import REFERENCE, ROOT

EXAMPLE = re.compile("Falsifying example:|Failing test case:")  # older and newer hypothesis
WIDTH = 80
LABEL = 11
STUB = re.compile(r"kata (\d\d): write (\S+) in (\S+)")
# of a fact; others 2
LINES = {"came back": 3, "called": 3, "raised": 4, "example": 3, "in fact": 5, "": 4}


class KataFailure(AssertionError):
    """A comparison that failed; `facts` are (label, text) in the order of the message."""

    def __init__(self, facts: Sequence[tuple[str, str]], name: str | None = None) -> None:
        super().__init__("\n".join(f"{label}: {text}" for label, text in facts))
        self.facts = list(facts)
        self.name = name  # what was called


class UnwrittenName(Exception):
    """The learner's file has not the name that a test uses."""

    def __init__(self, name: str, file: str) -> None:
        super().__init__(f"{file} has no `{name}`")
        self.name, self.file = name, file


@dataclass
class Red:
    """Why one rung is red. `cause` is equal for rungs that are red for the same reason."""

    kata: str = ""  # id
    rung: str = ""
    order: int = 0  # of the test in the session
    title: str = ""
    says: str = ""
    cause: str = ""
    summary: str = ""  # of the cause, in a few words
    facts: list[tuple[str, str]] = field(default_factory=list)
    next: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def absent(self) -> bool:
        """Whether there is no code yet that could be right or wrong."""
        return self.cause.startswith(("stub ", "syntax ")) or self.facts[0][0] == "missing"


FIELDS = tuple(Red.__dataclass_fields__)


# --- from an exception to facts -------------------------------------------------------------------


def explain(error: BaseException, kata: Kata | None, test_file: Path) -> Red:
    """The facts about `error`, which a test in `test_file` ended with."""
    while nested := getattr(error, "exceptions", None):  # a group, as hypothesis raises for two
        error = nested[0]
    red = Red(cause=f"{type(error).__name__}: {error}")
    stub = STUB.match(str(error))
    if stub and is_stub(error):
        unwritten(red, kata, *stub.groups())
    elif isinstance(error, SyntaxError) and is_learner_file(error.filename):
        syntax_error(red, error)
    elif isinstance(error, UnwrittenName):
        red.facts = [("missing", str(error)), ("expected", f"the name `{error.name}` in it")]
        red.summary = f"{error.name} is missing"
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("recsys."):
        missing_module(red, error, kata)
    elif isinstance(error, overlay.OriginError):
        red.facts = [("wrong file", str(error))]
    elif isinstance(error, KataFailure):
        red.facts = list(error.facts)
        if error.__cause__ is not None:
            red.facts += place(frames(error.__cause__.__traceback__))
        red.facts += contract(kata, error.name)
    else:
        raised(red, error, kata, test_file)
    for note in getattr(error, "__notes__", []):
        if EXAMPLE.match(note):
            said = re.sub(r"#.*", "", note.partition(":")[2])  # its comments on how it varied
            text = " ".join(said.split())
            for loose, tight in (("( ", "("), ("[ ", "["), (", )", ")"), (", ]", "]")):
                text = text.replace(loose, tight)
            red.facts.append(("example", text))
            break
    return red


def is_stub(error: BaseException) -> bool:
    """Whether a stub raised it."""
    return isinstance(error, NotImplementedError) and bool(STUB.match(str(error)))


def is_absent(error: BaseException) -> bool:
    """Whether there is no code that could be right or wrong: a stub, a file that cannot be read."""
    missing = (SyntaxError, ImportError, UnwrittenName, overlay.OriginError)
    return is_stub(error) or isinstance(error, missing)


def unwritten(red: Red, kata: Kata | None, number: str, name: str, file: str) -> None:
    path = overlay.expected_file(file.removeprefix("src/").removesuffix(".py").replace("/", "."))
    line, says = definition(path, name)
    where = f"{shown(path) if path else file}{f':{line}' if line else ''}"
    red.cause = f"stub {number} {name}"
    if kata is None or kata.number == number:
        red.summary = "not written yet"
        red.facts = [("not written", f"write {name} in {where}")]
        red.facts += [("what it does", says)] if says else []
    else:
        red.summary = f"needs kata {number} first"
        red.facts = [
            (f"needs {number}", f"kata {number} first: write {name} in {where}"),
            ("or", "run with --impl mine: the reference stands in for what you did not write"),
        ]


def syntax_error(red: Red, error: SyntaxError) -> None:
    where = f"{shown(error.filename or '?')}:{error.lineno}"
    source = (error.text or "").rstrip("\n")
    bare = source.lstrip()
    caret = " " * max((error.offset or 1) - 1 - (len(source) - len(bare)), 0) + "^"
    red.cause = f"syntax {where}"
    red.summary = "the file cannot be read"
    red.facts = [(type(error).__name__, f"{error.msg}, in {where}")]
    red.facts += [("", f"{bare}\n{caret}")] if bare else []


def missing_module(red: Red, error: ModuleNotFoundError, kata: Kata | None) -> None:
    file = f"src/{(error.name or '').replace('.', '/')}.py"
    red.facts = [("missing", f"there is no {file}")]
    if kata and file.removeprefix("src/recsys/") in kata.files:
        red.facts += [("the stub", f"comes back with: kata reset {kata.number}")]
    red.summary = f"{file} is missing"


def raised(red: Red, error: BaseException, kata: Kata | None, test_file: Path) -> None:
    """An exception from the learner's code, or from the test on what it returned."""
    trace = frames(error.__traceback__)
    in_test = [each for each in trace if same(each[0].f_code.co_filename, test_file)]
    in_code = place(trace)
    name = None
    call = next(filter(None, (seen(*each) for each in reversed(in_test))), None)
    if call:
        red.facts.append(("called", call.text))
        name = call.name
    plain_assert = isinstance(error, AssertionError) and not in_code
    text = str(error) or "(no message)"
    if plain_assert:
        red.facts.append(("came back", "what fails this check: " + " ".join(text.split())))
    else:
        red.facts.append(("raised", f"{type(error).__name__}: {text}"))
    if in_code:
        red.facts += in_code
        where = in_code[0][1]
        red.cause = red.summary = f"{type(error).__name__} in {where}"
        if re.search(r":\d+$", where):  # not in a function: while it was imported
            file = where.rpartition(":")[0]
            red.facts = [fact for fact in red.facts if fact[0] != "called"]
            red.facts.insert(0, ("import", f"{file} cannot be imported"))
    elif in_test:
        frame, line = in_test[-1]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        red.facts.append(("in the test", f"{test_file.name}:{line} {source}"))
        red.facts += contract(kata, name)


def place(trace: Sequence[tuple[Any, int]]) -> list[tuple[str, str]]:
    """The learner's own line in a traceback: the innermost, the provided data package apart."""
    ours = [each for each in trace if is_learner_file(each[0].f_code.co_filename)]
    written = [each for each in ours if "/recsys/data/" not in each[0].f_code.co_filename]
    for frame, line in reversed(written or ours):
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        where = f"{shown(file)}:{line}" + ("" if function == "<module>" else f" {function}")
        return [("in", where), ("", linecache.getline(file, line).strip())]
    return []


def contract(kata: Kata | None, name: str | None) -> list[tuple[str, str]]:
    """Where the docstring of what was called is."""
    if kata is None or not name:
        return []
    for file, names in kata.files.items():
        for listed in names:
            if name in (listed, listed.partition(".")[0]) or listed.endswith(f".{name}"):
                path = overlay.expected_file("recsys." + file.removesuffix(".py").replace("/", "."))
                line = definition(path, listed)[0]
                return [("contract", f"{shown(path)}:{line} {listed}")] if path and line else []
    return []


def definition(path: Path | None, name: str) -> tuple[int | None, str]:
    """Line and first docstring line of the function or class `name` in a file."""
    try:
        node: Any = ast.parse(path.read_text(encoding="utf-8")) if path else None
    except (OSError, SyntaxError, ValueError):
        node = None
    for part in name.split(".") if node else ():
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            break
    if node is None:
        return None, ""
    return node.lineno, (ast.get_docstring(node) or "").partition("\n")[0]


def frames(trace: TracebackType | None) -> list[tuple[Any, int]]:
    found = []
    while trace is not None:
        found.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return found


def is_learner_file(file: str | None) -> bool:
    ours = tuple(str(r.path / "recsys") + os.sep for r in overlay.installed())
    return (file or "").startswith(ours)


def same(one: str, other: Path) -> bool:
    return Path(one).name == other.name and overlay.same_file(one, other)


def shown(path: str | Path) -> str:
    """A path as the learner knows it: from the top of the checkout, or from what --impl named."""
    path = Path(path)
    first = overlay.installed()[0].path
    if settings.transcript and path.is_relative_to(first):
        return f"src/{path.relative_to(first).as_posix()}"
    for root in overlay.installed():
        if root.name == "reference" and path.is_relative_to(root.path):
            path = REFERENCE / path.relative_to(root.path)
        elif path.is_relative_to(root.path) and not path.is_relative_to(ROOT):
            return (Path(root.name) / path.relative_to(root.path)).as_posix()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# --- from facts to a screen -----------------------------------------------------------------------


def screen(red: Red, others: Sequence[Red] = (), width: int = WIDTH) -> list[str]:
    """The lines of the message; the first line is its title."""
    width = max(min(width, WIDTH), 40)
    lines = textwrap.wrap(red.title, width)
    lines += textwrap.wrap(red.says, width)
    lines.append("")
    for label, text in red.facts:
        lines += fact(label, text, width)
    rest = collapsed(red, others)
    lines += ["", *(clip(line, width) for line in rest)] if rest else [""]
    return lines + [clip(red.next, width)] if red.next else lines


def fact(label: str, text: str, width: int) -> list[str]:
    """One fact: its label, then its text beside it, cut after a few lines."""
    room = width - LABEL - 4
    if label == "":  # source: as it is
        wrapped = [clip(line, room) for line in text.splitlines()]
    else:
        wrapped = [part for line in text.splitlines() for part in textwrap.wrap(line, room)]
    most = LINES.get(label, 2)
    if len(wrapped) > most:
        wrapped = [*wrapped[: most - 1], clip(wrapped[most - 1] + " ...", room)]
    return [
        f"  {label if i == 0 else '':<{LABEL}}  {line}".rstrip()
        for i, line in enumerate(wrapped or [""])
    ]


def collapsed(red: Red, others: Sequence[Red]) -> list[str]:
    """One line for each reason that other rungs are red."""
    here = [other for other in others if other.kata == red.kata]
    lines = []
    alike = [other for other in here if other.cause == red.cause]
    if alike:
        lines.append(f"+{len(alike)} red, same cause")
    rest = [other for other in here if other.cause != red.cause]
    unwritten = [other for other in rest if other.summary == "not written yet"]
    if unwritten:
        lines.append(f"+{len(unwritten)} red, not written yet")
    wrong = [other for other in rest if other.summary != "not written yet"]
    if wrong:
        names = dict.fromkeys(other.rung.removeprefix("test_") for other in wrong)
        lines.append(f"+{len(wrong)} red: {', '.join(names)}")
    away: dict[str, int] = {}
    for other in others:
        if other.kata != red.kata:
            away[other.kata] = away.get(other.kata, 0) + 1
    if away:
        counts = ", ".join(f"{kata.partition('_')[0]} ({n})" for kata, n in away.items())
        lines.append(f"+{sum(away.values())} red in other katas: {counts}")
    return lines


def clip(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


def title(kata: Kata, rung: str) -> str:
    """ "kata 03 Contrastive loss, rung 2 of 15: temperature" """
    names = [each.name for each in kata.rungs]
    words = rung.removeprefix("test_").replace("_", " ")
    place = f"rung {names.index(rung) + 1} of {len(names)}: " if rung in names else ""
    return f"kata {kata.number} {kata.title}, {place}{words}"


def green(kata: Kata) -> str:
    """What to type when plain pytest, which records nothing, found a kata green."""
    return f"kata {kata.number} is green. next: kata test {kata.number} puts it on the board"


def next_step(kata: Kata, red: Red, impls: Sequence[str]) -> str:
    """What to type next, and where the guide is if that fits."""
    given = () if settings.transcript else impls
    command = f"pytest katas/{kata.id}" + "".join(f" --impl {impl}" for impl in given)
    step = f"next: write it, then  {command}" if "write " in str(red.facts) else f"next: {command}"
    guide = f"   guide: kata guide {kata.number}"
    return step + guide if len(step + guide) <= WIDTH else step


