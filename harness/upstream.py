"""What an upstream reference holds, and in what a checkout differs from it.

Git's blobs are read with plumbing commands and hashed again here: no filter, replacement or
setting of the repository has a say in what is compared or written out.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.catalog import tomllib
from harness.errors import UsageError

PROJECT = "pyproject.toml"
DATA = "src/recsys/data"
SOLUTION = "reference_tests/solution"
FOLDERS = ("katas", "fixtures", "harness", "configs", DATA, SOLUTION)
FILES = ("conftest.py", "tox.ini", "constraints.txt", "kata", ".gitattributes")
# What Python or pytest reads by itself wherever it lies.
PLANTED = {"conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini"}
PLANTED |= {"setup.cfg", PROJECT, "sitecustomize.py", "usercustomize.py"}
COMPILED = (".pth", ".pyc", ".so", ".pyd")
# Made by tools and not looked into; `kata` and git ignore them too.
MADE = {".git", ".venv", ".kata", ".tox", ".ruff_cache", ".pytest_cache", ".hypothesis"}
MADE |= {"__pycache__", "node_modules", ".DS_Store", ".benchmarks", ".schemathesis"}
MADE_HERE = {"runs", "data", "build", "dist"}  # in the root of a checkout


@dataclass(frozen=True)
class Reference:
    """A commit of the repository at `root`."""

    root: Path
    name: str  # as it was asked for
    commit: str

    @cached_property
    def blobs(self) -> dict[str, tuple[str, str]]:
        """Path to (mode, id of the blob), of all files."""
        found = {}
        for entry in git(self.root, "ls-tree", "-r", "-z", self.commit).split(b"\0")[:-1]:
            about, _, path = entry.partition(b"\t")
            mode, kind, name = about.decode().split()
            if kind == "blob":
                found[os.fsdecode(path)] = (mode, name)
        return found

    def read(self, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        """The contents of the files whose path is wanted, each held against its id."""
        chosen = {path: name for path, (_, name) in self.blobs.items() if wanted(path)}
        asked = "".join(f"{name}\n" for name in chosen.values()).encode()
        answer = git(self.root, "cat-file", "--batch", given=asked)
        contents, place = {}, 0
        for path, name in chosen.items():
            end = answer.index(b"\n", place)
            size = int(answer[place:end].split()[2])
            data = answer[end + 1 : end + 1 + size]
            if blob_id(data, len(name)) != name:
                raise UsageError(f"{path} at {self.name}: git gave other bytes than {name[:12]}")
            contents[path] = data
            place = end + size + 2
        return contents

    def write(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Write the wanted files below `folder`."""
        for path, data in self.read(wanted).items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            file.chmod(0o755 if self.blobs[path][0] == "100755" else 0o644)


def resolve(root: Path, name: str | None) -> Reference:
    """The commit called `name` in the repository at `root`; None: the tag of its version.

    Raises:
        UsageError: no repository, or no such commit; the message says what to do.
    """
    try:
        git(root, "rev-parse", "--git-dir")
    except (OSError, subprocess.CalledProcessError):
        raise UsageError(
            f"{root} is not a git repository, so there is nothing to compare it with; "
            "run kata gate in a clone"
        ) from None
    asked = name or f"v{version(root)}"
    try:
        found = git(root, "rev-parse", "--verify", "--quiet", f"{asked}^{{commit}}")
    except subprocess.CalledProcessError:
        if name:
            help_ = "--against takes a tag, branch or commit; is it fetched?"
        else:
            help_ = (
                "it would be the\ntag of the version that is installed. Fetch it:\n"
                "  git fetch --tags URL-OF-THE-ORIGINAL-REPOSITORY\n"
                "or name a commit to compare with, kata gate --against REF, for example\n"
                "  ./kata gate --against origin/main"
            )
        raise UsageError(f"there is no {asked} in this repository; {help_}") from None
    return Reference(root, asked, found.decode().strip())


def version(root: Path) -> str:
    """The version that the checkout says it is."""
    try:
        return str(tomllib.loads((root / PROJECT).read_text("utf-8"))["project"]["version"])
    except (OSError, KeyError, ValueError):
        raise UsageError(
            f"{root / PROJECT} does not say which version this is; name what to compare with: "
            "kata gate --against REF"
        ) from None


def git(root: Path, *command: str, given: bytes | None = None) -> bytes:
    """What a git command prints; nothing of the caller's environment points it elsewhere."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env |= {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    return subprocess.run(
        ["git", "-C", str(root), "-c", f"safe.directory={root}", *command],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        check=True,
    ).stdout


def blob_id(data: bytes, length: int = 40) -> str:
    """Git's id of a file's content; `length` tells SHA-1 from SHA-256."""
    digest = hashlib.sha1 if length == 40 else hashlib.sha256
    return digest(b"blob %d\0" % len(data) + data).hexdigest()


# --- in what a checkout differs -------------------------------------------------------------------


@dataclass
class Difference:
    """Paths that should be as upstream has them and are not."""

    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changed or self.removed or self.added)

    def lines(self) -> list[str]:
        kinds = (("changed", self.changed), ("removed", self.removed), ("added", self.added))
        return [f"{kind}: {path}" for kind, paths in kinds for path in paths]


def is_protected(path: str) -> bool:
    """Whether the learner's copy of a file has to be upstream's."""
    return path in FILES or path.startswith(tuple(f"{folder}/" for folder in FOLDERS))


def compare(checkout: Path, reference: Reference) -> Difference:
    """Hold a checkout's files, tracked or not, against the blobs of a reference.

    What is compared: everything below `FOLDERS`, `FILES`, the parts of pyproject.toml that pytest
    and the package read, and anywhere whatever Python or pytest would read by itself. A learner's
    own configuration in configs/ is no difference.
    """
    there = dict(walk(checkout))
    expected = [path for path in reference.blobs if is_protected(path) or path == PROJECT]
    result = Difference(removed=[path for path in expected if path not in there])
    result.changed = [path for path in changed(checkout, reference) if path in there]
    if PROJECT in there and PROJECT in reference.blobs:
        upstream = reference.read(lambda path: path == PROJECT)[PROJECT]
        result.changed += project_changes(there[PROJECT], upstream)
    committed = tracked(checkout)
    shadowing = importable()
    for path in sorted(set(there) - set(reference.blobs)):
        if is_planted(path, shadowing) or (is_protected(path) and not is_own_config(path)):
            result.added.append(path)
    result.added += sorted(path for path in committed if path.endswith(COMPILED))
    result.added = sorted(set(result.added))
    return result


def changed(checkout: Path, reference: Reference) -> list[str]:
    """The protected files that are not as they were, or not there."""
    return [
        path
        for path, (mode, name) in reference.blobs.items()
        if is_protected(path) and not same(checkout / path, mode, name)
    ]


def walk(top: Path) -> Iterator[tuple[str, Path]]:
    """(path relative to `top`, file) of all files; a link is one, wherever it leads."""
    for folder, folders, files in os.walk(top):
        at_top = Path(folder) == top
        kept = [d for d in folders if d not in MADE and not (at_top and d in MADE_HERE)]
        links = [d for d in kept if os.path.islink(os.path.join(folder, d))]
        folders[:] = [d for d in kept if d not in links]
        for name in [*files, *links]:
            file = Path(folder, name)
            if name not in MADE:
                yield file.relative_to(top).as_posix(), file


def same(file: Path, mode: str, name: str) -> bool:
    """Whether a file is the blob called `name`, line ends aside (Windows checks out others)."""
    if file.is_symlink():
        return mode == "120000" and blob_id(os.fsencode(os.readlink(file)), len(name)) == name
    if not file.is_file():  # nothing, a folder, or a pipe that would never end
        return False
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return mode != "120000" and name in (
        blob_id(data, len(name)),
        blob_id(data.replace(b"\r\n", b"\n"), len(name)),
    )


def project_changes(file: Path, upstream: bytes) -> list[str]:
    """The parts of pyproject.toml that decide what runs, where they are not upstream's."""

    def parts(text: bytes) -> dict[str, Any]:
        table = tomllib.loads(text.decode("utf-8"))
        project, tool = table.get("project", {}), table.get("tool", {})
        return {
            "build-system": table.get("build-system"),
            "project.version": project.get("version"),
            "project.scripts": project.get("scripts"),
            "project.entry-points": project.get("entry-points"),
            "project.dependencies": project.get("dependencies"),
            "tool.pytest": tool.get("pytest"),
            "tool.hatch": tool.get("hatch"),
            "tool.uv": tool.get("uv"),
        }

    try:
        mine, theirs = parts(file.read_bytes()), parts(upstream)
    except (OSError, ValueError, AttributeError):
        return [f"{PROJECT} (it cannot be read)"]
    return [f"{PROJECT} [{key}]" for key in theirs if mine[key] != theirs[key]]


def is_planted(path: str, shadowing: set[str]) -> bool:
    """Whether Python or pytest would read this file though nobody asks for it."""
    *folders, name = path.split("/")
    if name in PLANTED or name.endswith(".pth"):
        return True
    package = folders[:2] == ["src", "recsys"] or folders[:1] == ["recsys"]
    if name == "__init__.py" and (package or folders in ([], ["src"])):
        return True
    # `.` and `src` are on the path of imports: src/numpy.py would be numpy
    top = folders[1:] if folders[:1] == ["src"] else folders
    first = (top[0] if top else name.partition(".")[0]).lower()
    is_code = name.endswith((".py", ".so", ".pyd", ".pyc"))
    return is_code and first in shadowing and not is_protected(path)


@functools.cache
def importable() -> set[str]:
    """The names of modules of the standard library and of what is installed."""
    names = set(sys.stdlib_module_names)
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        names |= {name.partition(".")[0] for name in os.listdir(place) if "-" not in name}
    return {name.lower() for name in names} - {"recsys", "harness", "katas", "reference_tests"}


def is_own_config(path: str) -> bool:
    return path.startswith("configs/") and path.endswith((".yaml", ".yml"))


def tracked(checkout: Path) -> list[str]:
    """What git keeps of a checkout; nothing if it is none."""
    try:
        listed = git(checkout, "ls-files", "-z").split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [os.fsdecode(path) for path in listed if path]
