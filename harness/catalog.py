"""What katas there are: `katas/*/kata.toml` as dataclasses, and their rungs. Imports no torch."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.paths import KATAS, ROOT, SRC

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PHASES = ("1A", "1B", "sprint")
TRACKS = ("core", "advanced")
ORDER = ("test_spec.py", "test_properties.py", "test_cost.py")  # of the files; others by name
KEYS = {"title", "phase", "hours", "track", "prerequisites", "preload", "shows", "files", "keep"}
KEYS |= {"seconds"}
DIGESTS = "stub.sha256"  # in a kata's folder: what its stubs look like, one line a file


class CatalogError(UsageError):
    """A kata.toml or a spec that is not as it should be; the message says where and what."""


@dataclass(frozen=True)
class Rung:
    """One small test of a kata."""

    name: str
    file: str  # name of the test file in the kata's folder
    line: int
    hints: tuple[str, ...]
    says: str  # first line of the docstring, or ""


@dataclass(frozen=True)
class Kata:
    """One kata. `files` maps a learner file, relative to src/recsys, to the names to write."""

    id: str  # "03_contrastive_loss"
    folder: Path
    title: str
    phase: str
    hours: float
    track: str
    prerequisites: tuple[str, ...]
    files: dict[str, tuple[str, ...]]
    keep: dict[str, tuple[str, ...]]  # public names that stay whole in the stub
    preload: tuple[str, ...] = ()  # modules that a warm runner imports beforehand
    seconds: float = 300.0  # that its tests may take
    shows: str = ""  # what `kata run` shows once this kata passes; "" where it is nothing new

    @property
    def number(self) -> str:
        return self.id.partition("_")[0]

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """The functions marked `@rung`, in teaching order; read without importing anything."""
        files = sorted(self.folder.glob("test_*.py"), key=lambda file: file_order(file.name))
        return tuple(rung for file in files for rung in rungs_of(file))

    @cached_property
    def stub_digests(self) -> dict[str, str]:
        """Learner file -> digest of its stub, as `kata stubs` wrote them."""
        try:
            lines = (self.folder / DIGESTS).read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        pairs = (line.split(maxsplit=1) for line in lines if line.strip())
        return {file: digest for digest, file in pairs}


MARK = re.compile(r"^@rung\b", re.M)
# A rung from its mark to the end of its docstring; no other function lies in between.
HEAD = re.compile(
    r'^@rung\((?:(?!^(?:async )?def ).)*?^(?:async )?def [^"]*?:\n {4}"""(?:(?!""").)*"""\n',
    re.M | re.S,
)


def load(folder: Path | None = None) -> list[Kata]:
    """All katas, by number.

    Raises:
        CatalogError: a kata.toml is malformed, or two katas claim one learner file.
    """
    folder = folder or KATAS
    katas = [read(file.parent) for file in sorted(folder.glob("*/kata.toml"))]
    ids = {kata.id for kata in katas}
    owner: dict[str, str] = {}
    for kata in katas:
        for needed in kata.prerequisites:
            if needed not in ids:
                raise CatalogError(f"{place(kata.folder)}: no kata is called {needed!r}")
        for file in kata.files:
            if file in owner:
                raise CatalogError(f"{file} belongs to both {owner[file]} and {kata.id}")
            owner[file] = kata.id
    return katas


def find(name: str, katas: Iterable[Kata] | None = None) -> Kata:
    """The kata called `name`: "3", "03", "03_contrastive_loss" or "katas/03_contrastive_loss"."""
    katas = list(load() if katas is None else katas)
    wanted = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    for kata in katas:
        if wanted == kata.id or (wanted.isdigit() and int(wanted) == int(kata.number)):
            return kata
    known = ", ".join(kata.id for kata in katas) or "none yet"
    raise CatalogError(f"there is no kata {name!r}; the katas are: {known}")


def owner_of(file: str, katas: Iterable[Kata]) -> Kata | None:
    """The kata that the learner file (relative to src/recsys) belongs to."""
    return next((kata for kata in katas if file in kata.files), None)


def read(folder: Path) -> Kata:
    """The kata in `folder`."""
    where = place(folder)
    if not re.fullmatch(r"\d\d_\w+", folder.name):
        raise CatalogError(f"{where}: the folder should be called NN_name, not {folder.name!r}")
    try:
        table = tomllib.loads((folder / "kata.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{where} is not valid TOML: {error}") from None
    unknown = set(table) - KEYS
    if unknown:
        raise CatalogError(f"{where}: unknown key {', '.join(sorted(unknown))}")

    def value(key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        if not isinstance(table.get(key), kind) or isinstance(table[key], bool):
            raise CatalogError(f"{where}: {key} should be {expected}, not {table.get(key)!r}")
        return table[key]

    def choice(key: str, choices: tuple[str, ...]) -> str:
        if value(key, str, "a string") not in choices:
            raise CatalogError(f"{where}: {key} should be one of {', '.join(choices)}")
        return table[key]

    def names(key: str) -> dict[str, tuple[str, ...]]:
        found = {}
        for file, listed in table.get(key, {}).items():
            if not (isinstance(listed, list) and all(isinstance(name, str) for name in listed)):
                raise CatalogError(f"{where}: [{key}] {file!r} should be a list of names")
            found[file] = tuple(listed)
        return found

    value("files", dict, "a table of learner files and the names to write in them")
    return Kata(
        id=folder.name,
        folder=folder,
        title=value("title", str, "a string"),
        phase=choice("phase", PHASES),
        hours=value("hours", (int, float), "a number of hours"),
        track=choice("track", TRACKS),
        prerequisites=tuple(value("prerequisites", list, "a list of kata names")),
        files=names("files"),
        keep=names("keep"),
        preload=tuple(table.get("preload", [])),
        seconds=value("seconds", (int, float), "a number") if "seconds" in table else 300.0,
        shows=value("shows", str, "a sentence") if "shows" in table else "",
    )


def rungs_of(file: Path) -> list[Rung]:
    """The rungs of a test file, in its order.

    The board asks at every call, so only what stands above a rung's code is parsed: a tenth of it.
    """
    text = file.read_text(encoding="utf-8")
    heads = [(m.start(), f"{m.group()}    pass\n") for m in HEAD.finditer(text)]
    if not heads or len(heads) != len(MARK.findall(text)):
        heads = [(0, text)]  # written in another way: all of it
    try:
        return [
            Rung(node.name, file.name, line + node.lineno, hints_of(mark), says(node))
            for start, head in heads
            for line in [text.count("\n", 0, start)]
            for node in ast.parse(head).body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for mark in node.decorator_list
            if isinstance(mark, ast.Call) and getattr(mark.func, "id", None) == "rung"
        ]
    except SyntaxError as error:
        raise CatalogError(f"{file}:{error.lineno}: {error.msg}") from None


def hints_of(mark: ast.Call) -> tuple[str, ...]:
    """The hints in `@rung(hint=...)` or `@rung(hints=[...])`, which have to be literals."""
    for keyword in mark.keywords:
        if keyword.arg in ("hint", "hints"):
            hints = ast.literal_eval(keyword.value)
            return (hints,) if isinstance(hints, str) else tuple(hints)
    return ()


def says(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first line of the docstring."""
    return (ast.get_docstring(node) or "").partition("\n")[0]


def file_order(name: str) -> tuple[int, str]:
    """Sort key of a kata's test files."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def digest(text: str | bytes) -> str:
    """Digest of a source text that does not depend on its line ends."""
    data = text.encode() if isinstance(text, str) else text
    lines = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return hashlib.sha256(lines.rstrip(b"\n")).hexdigest()


def is_attempted(kata: Kata, file: str) -> bool:
    """Whether the learner file differs from its stub. A missing file is not attempted."""
    try:
        text = (SRC / "recsys" / file).read_bytes()
    except OSError:
        return False
    stub = kata.stub_digests.get(file)
    if stub is None:  # an author's new kata: no digest was written yet
        from harness import stubs

        stub = digest(stubs.generate(kata, file))
    return digest(text) != stub


def place(folder: Path) -> str:
    """The kata.toml of `folder` as a message calls it."""
    file = folder / "kata.toml"
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)
