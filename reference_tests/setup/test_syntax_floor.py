"""Every Python file is one that Python 3.10 can read and import; checked without a Python 3.10."""

import ast
import subprocess
import sys

import pytest

from harness.paths import ROOT

# Added to the standard library after 3.10: modules, and names in modules that were there.
NEWER_MODULES = {"tomllib", "wsgiref.types", "asyncio.taskgroups", "asyncio.timeouts"}
NEWER_NAMES = {
    "enum": {"StrEnum", "ReprEnum", "verify", "member", "nonmember", "EnumCheck"},
    "typing": {
        "Self", "Never", "LiteralString", "assert_never", "assert_type", "reveal_type", "override",
        "NotRequired", "Required", "Unpack", "TypeVarTuple", "dataclass_transform", "ReadOnly",
        "TypeAliasType", "TypeIs", "NoDefault", "get_overloads",
    },
    "datetime": {"UTC"},
    "contextlib": {"chdir"},
    "itertools": {"batched"},
    "hashlib": {"file_digest"},
    "math": {"cbrt", "exp2", "sumprod"},
    "operator": {"call"},
    "asyncio": {"TaskGroup", "timeout", "Runner", "Barrier"},
}  # fmt: skip
NEWER_BUILTINS = {"ExceptionGroup", "BaseExceptionGroup"}


def files():
    """What git knows or would add; all of the tree where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = listed.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        skip = {".venv", ".kata", ".git", ".tox"}
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [path.as_posix() for path in paths if path.parts[0] not in skip]
    found = [name for name in names if name.endswith(".py") or name == "kata"]
    return sorted(name for name in found if (ROOT / name).is_file())


def too_new(text):
    """What in a source text Python 3.10 does not have: a list of (line, what)."""
    tree = ast.parse(text, feature_version=(3, 10))
    fallback = {
        id(node)
        for attempt in ast.walk(tree)
        if isinstance(attempt, ast.Try) and attempt.handlers
        for statement in attempt.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in fallback:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in NEWER_MODULES]
        elif isinstance(node, ast.ImportFrom):
            newer = NEWER_NAMES.get(node.module, set())
            names = [alias.name for alias in node.names if alias.name in newer]
            names += [node.module] if node.module in NEWER_MODULES else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            newer = NEWER_NAMES.get(node.value.id, set())
            names = [f"{node.value.id}.{node.attr}"] if node.attr in newer else []
        elif isinstance(node, ast.Name) and node.id in NEWER_BUILTINS:
            names = [node.id]
        elif getattr(ast, "TryStar", None) and isinstance(node, ast.TryStar):
            names = ["except*"]
        else:
            names = []
        found += [(node.lineno, name) for name in names]
    return found


@pytest.mark.parametrize("name", files())
def test_python_310_has_all_that_is_used(name):
    assert too_new((ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import tomllib",
        "from typing import Self",
        "import typing\nx: typing.Never",
        "from datetime import UTC",
        "import contextlib\nwith contextlib.chdir('/'): pass",
        "raise ExceptionGroup('', [])",
    ],
)
def test_what_is_too_new_is_found(text):
    assert too_new(text)


@pytest.mark.parametrize("text", ["type X = int", "def f[T](): ...", "try: ...\nexcept* E: ..."])
def test_syntax_that_is_too_new_is_found(text):
    try:
        assert too_new(text)
    except SyntaxError:
        pass


def test_a_fallback_is_allowed():
    text = "try:\n import tomllib\nexcept ModuleNotFoundError:\n import tomli as tomllib"
    assert too_new(text) == []


def test_ruff_holds_the_floor():
    """ruff reports syntax that is newer than its target version."""
    pytest.importorskip("ruff")
    for text, code in (("x = 1\n", 0), ("try:\n    pass\nexcept* ValueError:\n    pass\n", 1)):
        command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "x.py"]
        ended = subprocess.run(
            [*command, "-"], input=text, cwd=ROOT, capture_output=True, text=True
        )
        assert ended.returncode == code, ended.stdout
