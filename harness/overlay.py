"""`--impl`: whose implementation of `recsys` runs.

A root is a folder that holds `recsys/...`. `recsys` and its sub-packages are namespace packages,
merged over the roots; of a module that several roots hold, the first root's file is taken. This is
the only mechanism: the learner's code, the reference, mistakes and alternates are all just roots.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from harness import catalog
from harness.errors import UsageError
from harness.paths import KATAS, REFERENCE, SRC, STATE

PACKAGE = "recsys"
KEPT_MIXTURES = 10


class OriginError(Exception):
    """A learner module came from another file than --impl says."""


@dataclass(frozen=True)
class Root:
    """One root: how it is called, and the folder that holds `recsys/...`."""

    name: str
    path: Path


# --- from --impl to roots -------------------------------------------------------------------------


def resolve(impls: Iterable[str], cwd: str | Path) -> list[Root]:
    """The roots that `--impl ... --impl ...` means, first wins; `src` is always the last.

    Args:
        impls: "reference", "mine" or a folder, relative to `cwd`.

    Raises:
        UsageError: a folder that is not there, or that holds no `recsys`.
    """
    roots: list[Root] = []
    for impl in impls:
        if impl == "reference":
            roots.append(Root("reference", REFERENCE))
        elif impl == "mine":  # src, with the reference in its gaps
            roots += [Root("reference", gaps()), Root("src", SRC)]
        else:
            roots.append(Root(impl, folder_root(impl, Path(cwd))))
    first: dict[Path, Root] = {}
    for root in [*roots, Root("src", SRC)]:
        first.setdefault(root.path, root)
    return list(first.values())


def folder_root(impl: str, cwd: Path) -> Path:
    expected = "expected `mine`, `reference`, or a folder that holds `recsys/...`"
    path = Path(os.path.abspath(cwd / Path(impl).expanduser()))
    if not path.is_dir():
        raise UsageError(f"--impl {impl}: there is no folder {path}; {expected}")
    if not (path / PACKAGE).is_dir():
        hint = f" (did you mean {path.parent}?)" if path.name == PACKAGE else ""
        raise UsageError(f"--impl {impl}: {path} has no folder `{PACKAGE}`; {expected}{hint}")
    return path


def gaps() -> Path:
    """A root with the reference's file for each one that the learner did not write.

    The folder's name is a digest of what it holds, so it is never rewritten while it is in use.
    """
    katas = catalog.load()
    texts = {}
    for path in sorted((REFERENCE / PACKAGE).rglob("*.py")):
        file = path.relative_to(REFERENCE / PACKAGE).as_posix()
        kata = catalog.owner_of(file, katas)
        theirs = catalog.is_attempted(kata, file) if kata else (SRC / PACKAGE / file).is_file()
        if not theirs:
            texts[file] = path.read_bytes()
    key = sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
    parent = STATE / "mine"
    if not (parent / key).is_dir():
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        (made / PACKAGE).mkdir()
        for file, text in texts.items():
            (made / PACKAGE / file).parent.mkdir(parents=True, exist_ok=True)
            (made / PACKAGE / file).write_bytes(text)
        try:
            made.rename(parent / key)
        except OSError:  # another process was faster
            shutil.rmtree(made, ignore_errors=True)
        old = sorted(parent.glob("[!.]*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in old[KEPT_MIXTURES:]:
            shutil.rmtree(path, ignore_errors=True)
    return parent / key


# --- from roots to modules ------------------------------------------------------------------------


class SourceLoader(SourceFileLoader):
    """Always compiles: a .pyc is stale after an edit within one second that keeps the size."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class Finder(MetaPathFinder):
    """Finds `recsys...` in the roots; blind to `__init__.py`: each folder is a namespace."""

    def __init__(self, roots: Sequence[Root]) -> None:
        self.roots = list(roots)

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        places = [root.path.joinpath(*fullname.split(".")) for root in self.roots]
        for place in places:
            file = place.with_name(place.name + ".py")
            if file.is_file():
                return spec_from_file_location(
                    fullname, file, loader=SourceLoader(fullname, str(file))
                )
        folders = [str(place) for place in places if place.is_dir()]
        if not folders:
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = folders
        return spec


_finder: Finder | None = None
_before: dict[str, str | None] = {}  # environment variables as they were
_added: list[str] = []  # entries of sys.path


def installed() -> list[Root]:
    """The roots in force; `src` alone when nothing was installed."""
    return _finder.roots if _finder else [Root("src", SRC)]


def is_installed() -> bool:
    """Whether `install` is in force."""
    return _finder is not None


def install(roots: Sequence[Root]) -> None:
    """Take `recsys` from `roots` from now on, in this process and in those it spawns."""
    global _finder
    uninstall()
    _finder = Finder(roots)
    sys.meta_path.insert(0, _finder)
    paths = [str(root.path) for root in roots]
    sys.path[:0] = paths
    _added.extend(paths)
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        _before[name] = os.environ.get(name)
    inherited = [_before["PYTHONPATH"]] if _before["PYTHONPATH"] else []
    os.environ["PYTHONPATH"] = os.pathsep.join(paths + inherited)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    purge()


def uninstall() -> None:
    """Undo `install`; modules that are loaded stay loaded."""
    global _finder
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    _finder = None
    for path in _added:
        if path in sys.path:
            sys.path.remove(path)
    _added.clear()
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()


@contextmanager
def using(roots: Sequence[Root]) -> Iterator[None]:
    """`recsys` from these roots for a while, then as it was before, the same modules included."""
    before = installed() if is_installed() else None
    modules = purge()
    install(roots)
    try:
        yield
    finally:
        uninstall()
        purge()
        if before is not None:
            install(before)
        sys.modules.update(modules)  # who holds a class of theirs still catches what they raise


def purge() -> dict[str, ModuleType]:
    """Forget `recsys` and the kata tests, so that the next import reads the files again.

    Returns:
        the modules that were there.
    """
    katas, gone = str(KATAS) + os.sep, {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] in (PACKAGE, "katas") or str(file).startswith(katas):
            gone[name] = sys.modules.pop(name)
    return gone


# --- what came from where -------------------------------------------------------------------------


def expected_file(module: str) -> Path | None:
    """The file that `module` has to come from: that of the first root which has it."""
    relative = Path(*module.split(".")).with_suffix(".py")
    return next((r.path / relative for r in installed() if (r.path / relative).is_file()), None)


def check_origin(module: ModuleType) -> None:
    """Hold `module`, and each `recsys` module loaded with it, against the roots.

    Raises:
        OriginError: one comes from another file; the message names both.
    """
    if unchanged(module):
        return
    loaded = {n: m for n, m in list(sys.modules.items()) if n.startswith(PACKAGE + ".")}
    for each in [module, *loaded.values()]:
        file = getattr(each, "__file__", None)
        expected = expected_file(each.__name__)
        if file is None and expected is None:
            continue  # a namespace
        if file is None or expected is None or not same_file(file, expected):
            raise OriginError(
                f"{each.__name__} was loaded from {file}, but --impl means {expected}: something "
                "else put it into sys.modules or in front on sys.path"
            )
    _held[:] = [len(sys.modules), installed(), loaded | {module.__name__: module}]


_held: list[Any] = []  # sys.modules' length, the roots and the modules of the last good check


def unchanged(module: ModuleType) -> bool:
    """Whether the last check was of these very modules: it is asked at each use of one."""
    if not _held or _held[0] != len(sys.modules) or _held[1] != installed():
        return False
    modules: dict[str, ModuleType] = _held[2]
    if modules.get(module.__name__) is not module:
        return False
    return all(sys.modules.get(name) is each for name, each in modules.items())


def same_file(one: str | Path, other: str | Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def who() -> dict[str, str]:
    """Whose each learner file is: "yours", "stub", "reference", or the folder given to --impl."""
    katas = catalog.load()
    files: dict[str, catalog.Kata | None] = {f: kata for kata in katas for f in kata.files}
    for path in sorted((REFERENCE / PACKAGE).rglob("*.py")):
        files.setdefault(path.relative_to(REFERENCE / PACKAGE).as_posix(), None)
    return {file: whose(file, kata) for file, kata in files.items()}


def whose(file: str, kata: catalog.Kata | None) -> str:
    root = next((r for r in installed() if (r.path / PACKAGE / file).is_file()), None)
    if root is None:
        return "missing"
    if root.path != SRC:
        return root.name
    return "stub" if kata and not catalog.is_attempted(kata, file) else "yours"
