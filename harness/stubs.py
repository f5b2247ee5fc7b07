"""`kata stubs`: the learner's files, generated from the reference solution.

The bodies of the functions that kata.toml lists become `raise NotImplementedError("kata 01: write
... in ...")`; signatures, docstrings, decorators and the comments around them stay. What nothing
kept refers to any more, private helpers and imports, vanishes. A public function that is not listed
would be given away whole, so it is an error unless kata.toml keeps it deliberately, under [keep].
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Sequence
from pathlib import Path

import libcst as cst

from harness import catalog
from harness.catalog import Kata, digest, is_attempted
from harness.errors import UsageError
from harness.paths import REFERENCE, ROOT, SRC, STATE

WIDTH = 100


class StubError(UsageError):
    """A stub that cannot be made from what kata.toml lists; the message says why."""


# --- generating -----------------------------------------------------------------------------------


def generate(kata: Kata, file: str) -> str:
    """The stub of `file` (relative to src/recsys)."""
    source = REFERENCE / "recsys" / file
    try:
        text = source.read_text(encoding="utf-8")
    except OSError:
        raise StubError(f"kata {kata.number}: the reference has no {source}") from None
    return stub_text(text, kata.files[file], kata.keep.get(file, ()), kata.number, file)


def stub_text(
    source: str, names: tuple[str, ...], keep: tuple[str, ...], number: str, file: str
) -> str:
    """`source` with the bodies of `names` emptied.

    Raises:
        StubError: a name that is not there, or a public one that is neither listed nor kept.
    """
    check_names(source, names, keep, number, file)
    emptied = cst.parse_module(source).visit(Emptied(set(names), number, file))
    text = ""
    while text != emptied.code:  # `if TYPE_CHECKING:` may lose its last import
        text = emptied.code
        unused = unused_names(ast.parse(text), set(names))
        emptied = emptied.with_changes(body=without(emptied.body, unused))
    return text


def check_names(
    source: str, names: tuple[str, ...], keep: tuple[str, ...], number: str, file: str
) -> None:
    tree = ast.parse(source)
    bodies, known = functions(tree), definitions(tree.body)
    for name in names + keep:
        if name not in (bodies if name in names else known):
            raise StubError(f"kata {number} lists {name}, which the reference {file} has not")
    for name, node in bodies.items():
        given = any(name == kept or name.startswith(kept + ".") for kept in keep)
        public = not any(is_private(part) for part in name.split("."))
        if public and name not in names and not given and has_body(node):
            raise StubError(
                f"kata {number}: {file}:{node.lineno} {name} is public and has a body, but "
                "kata.toml lists it neither under [files] (the learner writes it) nor under "
                "[keep] (the stub shows it)"
            )


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Qualified name -> definition, of functions and of methods (also of nested classes)."""
    found = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[prefix + node.name] = node
            elif isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")

    walk(tree.body, "")
    return found


def has_body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether there is more than a docstring, `...` or `pass`."""
    return not all(
        isinstance(line, ast.Pass)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        for line in node.body
    )


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


class Emptied(cst.CSTTransformer):
    """Replaces the bodies of the listed functions; what is in a function is not looked into."""

    def __init__(self, names: set[str], number: str, file: str) -> None:
        self.names, self.number, self.file = names, number, file
        self.scope: list[str] = []

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.scope.append(node.name.value)

    def leave_ClassDef(
        self, original_node: cst.ClassDef, updated_node: cst.ClassDef
    ) -> cst.ClassDef:
        self.scope.pop()
        return updated_node

    def visit_FunctionDef(self, node: cst.FunctionDef) -> bool:
        self.scope.append(node.name.value)
        return False

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        name = ".".join(self.scope)
        self.scope.pop()
        if name not in self.names:
            return updated_node
        text = f'"kata {self.number}: write {name} in src/recsys/{self.file}"'
        indent = 4 * (len(self.scope) + 1)
        if indent + len(f"raise NotImplementedError({text})") <= WIDTH:
            line = f"raise NotImplementedError({text})\n"
        else:
            line = f"raise NotImplementedError(\n    {text}\n)\n"
        body: list[cst.BaseStatement] = [cst.parse_statement(line)]
        old = original_node.body
        if not isinstance(old, cst.IndentedBlock):  # def f(): return 1
            return updated_node.with_changes(body=cst.IndentedBlock(body=body))
        if original_node.get_docstring() is not None:
            body.insert(0, old.body[0])
        return updated_node.with_changes(body=cst.IndentedBlock(body=body, header=old.header))


def unused_names(tree: ast.Module, listed: set[str]) -> set[str]:
    """Imports, private helpers and private constants that nothing kept refers to.

    A method is called "Class.name". Starts from what stays in any case and follows its references.
    """
    optional = {
        name: node
        for name, node in definitions(tree.body).items()
        if is_private(name.rpartition(".")[2]) and name not in listed
    }
    names, attributes = references(tree, skip=set(optional.values()))
    while True:
        reached = [
            name
            for name in optional
            if name.rpartition(".")[2] in (attributes if "." in name else names)
        ]
        if not reached:
            break
        for name in reached:
            more = references(optional.pop(name), skip=set(optional.values()))
            names, attributes = names | more[0], attributes | more[1]
    return set(optional) | {name for name in imported(tree) if name not in names}


def definitions(body: list[ast.stmt], prefix: str = "") -> dict[str, ast.stmt]:
    """Qualified name -> function, class or assignment to one name, in a module and its classes."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[prefix + node.name] = node
        elif isinstance(node, ast.ClassDef):
            found[prefix + node.name] = node
            if not is_private(node.name):
                found |= definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if len(targets) == 1 and isinstance(targets[0], ast.Name):
                found[prefix + targets[0].id] = node
    return found


def references(node: ast.AST, skip: set[ast.stmt]) -> tuple[set[str], set[str]]:
    """The names that are read, and all names that may be a method's, under `node`."""
    names: set[str] = set()
    attributes: set[str] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            attributes.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # in __all__, or a quoted annotation
        waiting += [child for child in ast.iter_child_nodes(node) if child not in skip]
    return names, attributes | names


def imported(tree: ast.Module) -> set[str]:
    """The names that imports outside functions bind."""
    found = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if getattr(node, "module", None) != "__future__":
                found |= {a.asname or a.name.partition(".")[0] for a in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return found


def without(
    body: Sequence[cst.BaseStatement], unused: set[str], prefix: str = ""
) -> list[cst.BaseStatement]:
    """`body` less the definitions and imports in `unused`."""
    kept: list[cst.BaseStatement] = []
    gap = False  # the blank line above something that vanished
    for line in body:
        smaller = statement_without(line, unused, prefix)
        if smaller is None:
            gap = gap or any(e.comment is None for e in getattr(line, "leading_lines", ()))
            continue
        if gap and getattr(smaller, "leading_lines", None) == ():
            smaller = smaller.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        gap = False
        kept.append(smaller)
    return kept


def statement_without(
    line: cst.BaseStatement, unused: set[str], prefix: str
) -> cst.BaseStatement | None:
    """What of one statement is kept, None for nothing."""
    if isinstance(line, cst.FunctionDef):
        return None if prefix + line.name.value in unused else line
    if isinstance(line, cst.ClassDef):
        if prefix + line.name.value in unused:
            return None
        prefix = f"{prefix}{line.name.value}."
    if isinstance(line, cst.SimpleStatementLine) and len(line.body) == 1:
        return simple_without(line, unused, prefix)
    if isinstance(line, (cst.ClassDef, cst.If)) and isinstance(line.body, cst.IndentedBlock):
        inner = without(line.body.body, unused, prefix)
        if not inner and isinstance(line, cst.If) and line.orelse is None:
            return None  # `if TYPE_CHECKING:` with nothing left to import
        return line.with_changes(body=line.body.with_changes(body=inner))
    return line


def simple_without(
    line: cst.SimpleStatementLine, unused: set[str], prefix: str
) -> cst.SimpleStatementLine | None:
    """What of an assignment or an import is kept."""
    only = line.body[0]
    if isinstance(only, (cst.Assign, cst.AnnAssign)):
        target = only.targets[0].target if isinstance(only, cst.Assign) else only.target
        gone = isinstance(target, cst.Name) and prefix + target.value in unused
        return None if gone else line
    if not isinstance(only, (cst.Import, cst.ImportFrom)) or isinstance(only.names, cst.ImportStar):
        return line
    names = [alias for alias in only.names if binds(alias) not in unused]
    if not names or len(names) == len(only.names):
        return line if names else None
    if getattr(only, "lpar", None) is None:
        names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return line.with_changes(body=[only.with_changes(names=names)])


def binds(alias: cst.ImportAlias) -> str:
    """The name that an import binds."""
    return alias.evaluated_alias or alias.evaluated_name.partition(".")[0]


# --- writing --------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> int:
    """`kata stubs [--check]`: write the stubs, or only say which are not current."""
    katas = catalog.load()
    stale = [line for kata in katas for line in out_of_date(kata)]
    if args.check:
        print("\n".join(stale) or "the stubs are current")
        if stale:
            print("Bring them up to date: kata stubs")
        return int(bool(stale))
    refused = [file for kata in katas for file in write(kata, force=args.force)]
    print("\n".join(f"brought up to date: {line}" for line in stale) or "the stubs are current")
    for file in refused:
        print(f"left alone, since it is somebody's work: src/recsys/{file} (`kata reset` moves it)")
    return int(bool(refused))


def out_of_date(kata: Kata) -> list[str]:
    """What `kata stubs` would change; learner files that are attempted are not looked at."""
    lines = []
    for file in kata.files:
        stub = generate(kata, file)
        path = SRC / "recsys" / file
        if kata.stub_digests.get(file) != digest(stub):
            lines.append(f"{file}: its digest in katas/{kata.id}/{catalog.DIGESTS}")
        if not path.is_file():
            lines.append(f"{file}: not in src/recsys")
        elif not is_attempted(kata, file) and digest(path.read_bytes()) != digest(stub):
            lines.append(f"{file}: src/recsys has an earlier stub")
    gone = set(kata.stub_digests) - set(kata.files)
    return lines + [f"{file}: no longer in kata.toml, but it has a digest" for file in sorted(gone)]


def write(kata: Kata, *, force: bool = False) -> list[str]:
    """Write a kata's stubs and their digests; returns the attempted files, which are left alone.

    With `force` these are replaced as well, and kept under .kata/kept.
    """
    stubs = {file: generate(kata, file) for file in kata.files}
    refused = []
    for file, stub in stubs.items():
        path = SRC / "recsys" / file
        attempted = is_attempted(kata, file) and digest(path.read_bytes()) != digest(stub)
        if attempted and not force:
            refused.append(file)
        elif attempted:
            replace(file, stub)
        elif not path.is_file() or digest(path.read_bytes()) != digest(stub):
            put(path, stub)
    digests = "".join(f"{digest(stub)}  {file}\n" for file, stub in stubs.items())
    put(kata.folder / catalog.DIGESTS, digests)
    kata.__dict__.pop("stub_digests", None)
    return refused


def replace(file: str, stub: str, *, keep: bool = True) -> Path | None:
    """Put a fresh stub in place of a learner file; where the old text is kept, if it is."""
    path = SRC / "recsys" / file
    kept = None
    if keep:
        stamp = time.strftime("%Y-%m-%d-%H%M%S")
        kept = unused_path(STATE / "kept" / f"{stamp}-{file.replace('/', '-')}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(path.read_bytes())
    put(path, stub)
    return kept


def unused_path(path: Path) -> Path:
    """`path`, numbered if there is such a file already."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in range(2, 10_000))
    return path if not path.exists() else next(each for each in numbered if not each.exists())


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(path.name + ".new")
    made.write_text(text, encoding="utf-8", newline="\n")
    made.replace(path)


def show(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()
