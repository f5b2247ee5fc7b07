"""The catalogue: known mistakes and right-but-different solutions, as texts for `--impl`.

A mistake is a TOML file in mistakes/NN_name/: what the learner believes, the tutor's words, and the
edits of the reference that make it (see docs/authoring.md). An alternate is a folder in
alternates/NN_name/ that holds recsys/..., or a TOML file there: how it differs, and the edits.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.catalog import Kata, tomllib
from harness.paths import REFERENCE, REFERENCE_TESTS, ROOT

MISTAKES = REFERENCE_TESTS / "mistakes"
ALTERNATES = REFERENCE_TESTS / "alternates"
LONGEST = {"misconception": 130, "tutor": 280}  # they have to fit into one screen


class CatalogueError(Exception):
    """An entry that is not as it should be; the message names the file and what was expected."""


@dataclass(frozen=True)
class Mistake:
    """A known wrong implementation. `texts` maps a learner file to its wrong text."""

    id: str
    path: Path
    misconception: str
    tutor: str
    evidence: str
    unnamed: str  # why no probe can name it, if none can
    texts: dict[str, str]


@dataclass(frozen=True)
class Alternate:
    """A right implementation unlike the reference. `texts` maps a learner file to its text."""

    id: str
    path: Path
    says: str  # how it differs: of a folder, the first line of the docstring
    texts: dict[str, str]


Entry = TypeVar("Entry", Mistake, Alternate)


def mistakes_of(kata: Kata) -> list[Mistake]:
    """The kata's mistakes, by name.

    Raises:
        CatalogueError: one is malformed, changes nothing, or is the same program as another.
    """
    return distinct([read(kata, path) for path in sorted((MISTAKES / kata.id).glob("*.toml"))])


def distinct(found: list[Entry]) -> list[Entry]:
    """The same entries, if no two are one program."""
    seen: dict[str, str] = {}
    for each in found:
        program = "".join(without_docs(text) for _, text in sorted(each.texts.items()))
        program += str(sorted(each.texts))
        other = seen.setdefault(program, each.id)
        if other != each.id:
            raise CatalogueError(f"{shown(each.path)} is the same program as {other}")
    return found


def read(kata: Kata, path: Path) -> Mistake:
    table = table_of(path, ("misconception", "tutor", "evidence"), ("unnamed",))
    return Mistake(
        id=path.stem,
        path=path,
        misconception=" ".join(table["misconception"].split()),
        tutor=" ".join(table["tutor"].split()),
        evidence=table["evidence"],
        unnamed=table.get("unnamed", ""),
        texts=changed(kata, table, shown(path)),
    )


def table_of(path: Path, sentences: tuple[str, ...], others: tuple[str, ...] = ()) -> Any:
    """An entry's table, with all of `sentences` in it and nothing that is not known."""
    where = shown(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{where} is not valid TOML: {error}") from None
    if unknown := set(table) - {*sentences, *others, "edit", "function"}:
        raise CatalogueError(f"{where}: unknown key {', '.join(sorted(unknown))}")
    for key in sentences:
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise CatalogueError(f"{where}: {key} should be a sentence")
        if len(table[key]) > LONGEST.get(key, 1000):
            raise CatalogueError(
                f"{where}: {key} has {len(table[key])} characters; at most {LONGEST[key]} fit"
            )
    return table


def changed(kata: Kata, table: dict[str, Any], where: str) -> dict[str, str]:
    """The reference's files with the entry's edits: learner file -> text."""
    texts: dict[str, str] = {}
    for kind, apply in (("edit", edited), ("function", replaced)):
        for change in table.get(kind, []):
            file = file_of(kata, change, where)
            if file not in texts:
                texts[file] = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
            texts[file] = apply(texts[file], change, where)
    for file, text in texts.items():
        original = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
        try:
            same = without_docs(text) == without_docs(original)
        except SyntaxError as error:
            line = text.splitlines()[(error.lineno or 1) - 1].strip()
            raise CatalogueError(f"{where}: {error.msg} in what it makes: {line}") from None
        if same:
            raise CatalogueError(f"{where} is the reference itself: it changes nothing in {file}")
    if not texts:
        raise CatalogueError(f"{where}: expected at least one [[edit]] or [[function]]")
    return texts


def file_of(kata: Kata, change: dict[str, Any], where: str) -> str:
    file = change.get("file") or (next(iter(kata.files)) if len(kata.files) == 1 else "")
    if file not in kata.files:
        files = ", ".join(kata.files)
        raise CatalogueError(f"{where}: file should be one of {files}, not {file!r}")
    return file


def edited(text: str, change: dict[str, Any], where: str) -> str:
    """`find` becomes `replace`, once."""
    find, replace = change.get("find"), change.get("replace")
    if not isinstance(find, str) or not isinstance(replace, str):
        raise CatalogueError(f"{where}: an [[edit]] has `find` and `replace`")
    times = text.count(find)
    if times != 1:
        raise CatalogueError(
            f"{where}: `find` should occur once in the reference, not {times} times: "
            f"{find.strip()!r}"
        )
    return text.replace(find, replace)


def replaced(text: str, change: dict[str, Any], where: str) -> str:
    """A whole function, with its decorators, becomes `code`."""
    name, code = change.get("name"), change.get("code")
    if not isinstance(name, str) or not isinstance(code, str):
        raise CatalogueError(f"{where}: a [[function]] has `name` and `code`")
    node: Any = ast.parse(text)
    for part in name.split("."):
        node = next((n for n in node.body if getattr(n, "name", None) == part), None)
        if node is None:
            raise CatalogueError(f"{where}: the reference has no `{name}`")
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)]) - 1
    body = textwrap.indent(textwrap.dedent(code).strip("\n") + "\n", " " * node.col_offset)
    return "".join([*lines[:first], body, *lines[node.end_lineno :]])


def without_docs(text: str) -> str:
    """The program without its docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def alternates_of(kata: Kata) -> list[Alternate]:
    """The kata's alternates, by name.

    Raises:
        CatalogueError: one is malformed, is the reference itself or the same program as another,
            or a folder has none of the kata's files.
    """
    found: dict[str, Alternate] = {}
    for path in sorted((ALTERNATES / kata.id).glob("*")):
        if path.suffix == ".toml":
            table = table_of(path, ("says",))
            texts = changed(kata, table, shown(path))
            made = Alternate(path.stem, path, table["says"], texts)
        elif path.is_dir():
            made = alternate_in(kata, path)
        else:
            continue
        if made.id in found:
            raise CatalogueError(f"{shown(path.parent)}: {made.id} is there twice")
        found[made.id] = made
    return distinct(list(found.values()))


def alternate_in(kata: Kata, root: Path) -> Alternate:
    """An alternate that is a folder."""
    texts = {}
    for file in kata.files:
        if (root / "recsys" / file).is_file():
            texts[file] = (root / "recsys" / file).read_text(encoding="utf-8")
            original = (REFERENCE / "recsys" / file).read_text(encoding="utf-8")
            if without_docs(texts[file]) == without_docs(original):
                raise CatalogueError(f"{shown(root)}: {file} is the reference itself")
    if not texts:
        names = ", ".join(f"recsys/{file}" for file in kata.files)
        raise CatalogueError(f"{shown(root)} holds none of {names}")
    docs = ast.get_docstring(ast.parse(next(iter(texts.values())))) or ""
    return Alternate(root.name, root, docs.partition("\n")[0], texts)


def lay(texts: dict[str, str], root: Path) -> Path:
    """Write a folder for `--impl` that holds `texts` (learner file -> text)."""
    for file, text in texts.items():
        path = root / "recsys" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
