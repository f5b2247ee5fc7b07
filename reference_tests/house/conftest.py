"""A miniature checkout with katas of its own, so that these tests do not depend on the real ones.

Its katas need no torch, so a run takes half a second.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.paths import ROOT

SCALE = '''"""Scaling (kata 01)."""

from __future__ import annotations

import math


def scale(x: int, *, factor: int = 2) -> int:
    """The value times the factor."""
    _check(factor)
    return x * factor


def total(values: list[int]) -> int:
    """The sum of all values."""
    return sum(values)


def _check(factor: int) -> None:
    if not math.isfinite(factor):
        raise ValueError(f"factor should be finite, not {factor}")
'''

SHIFT = '''"""Shifting (kata 02)."""

from recsys.models.scale import scale


def shift(x: int) -> int:
    """One more than twice the value."""
    return scale(x) + 1
'''

SCALE_SPEC = '''from harness.spec import assert_equal, expect_error, learner, rung

models = learner("models.scale")


@rung(hint="Multiply.")
def test_doubles():
    """The default factor is 2."""
    assert_equal(models.scale(21), 42)


@rung(hint="Use the factor.")
def test_factor():
    """The factor multiplies."""
    factor = 3
    found = models.scale(5, factor=factor)
    assert_equal(found, 15)


@rung(hints=["Check it.", "math.isfinite"])
def test_refuses_infinity():
    """A factor that is not finite is refused."""
    expect_error(lambda: models.scale(1, factor=float("inf")), ValueError, about="factor")


@rung(hint="Sum.")
def test_total():
    """The total counts every value."""
    assert_equal(models.total([1, 2, 3]), 6)
'''

SHIFT_SPEC = '''from harness.spec import assert_equal, learner, rung

models = learner("models.shift")


@rung(hint="Add 1.")
def test_shift():
    """Twice and one more."""
    assert_equal(models.shift(3), 7)
'''

TOML = """title = "{title}"
phase = "1A"
hours = 1
track = "core"
prerequisites = [{needs}]

[files]
"models/{name}.py" = [{names}]
"""


@dataclass
class Checkout:
    """A copy of the harness with two katas: 01_scale, and 02_shift which needs it."""

    root: Path

    @property
    def scale(self) -> Path:
        return self.root / "src/recsys/models/scale.py"

    @property
    def spec(self) -> Path:
        return self.root / "katas/01_scale/test_spec.py"

    def pytest(self, *args: object, cwd: Path | None = None, **env: str) -> Run:
        """Run pytest in a child; its plugins are those that are asked for."""
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        return self.python("-m", "pytest", *args, cwd=cwd, **env)

    def kata(self, *args: object) -> Run:
        return self.python("-m", "harness", *args)

    def python(self, *args: object, cwd: Path | None = None, **env: str) -> Run:
        drop = ("KATA_", "PYTEST_", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd or self.root,
            env={**inherited, "COLUMNS": "80", **env},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    def solve(self) -> None:
        """Write the right answer of kata 01 into src."""
        self.scale.write_text(SCALE)

    def layer(self, name: str, text: str, file: str = "models/scale.py") -> Path:
        """A folder for --impl, beside the checkout, with one file."""
        root = self.root.parent / name
        target = root / "recsys" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return root


@dataclass
class Run:
    """How a child ended."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine") / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "harness", root / "harness", ignore=ignored)
    for file in ("conftest.py", "tox.ini"):
        shutil.copy(ROOT / file, root / file)
    for name, text in (("scale", SCALE), ("shift", SHIFT)):
        file = root / f"reference_tests/solution/recsys/models/{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for kata, spec, needs, names in (
        ("01_scale", SCALE_SPEC, "", '"scale", "total"'),
        ("02_shift", SHIFT_SPEC, '"01_scale"', '"shift"'),
    ):
        folder = root / "katas" / kata
        folder.mkdir(parents=True)
        name = kata[3:]
        toml = TOML.format(title=name.capitalize(), name=name, needs=needs, names=names)
        (folder / "kata.toml").write_text(toml)
        (folder / "test_spec.py").write_text(spec)
    (root / "src/recsys").mkdir(parents=True)
    written = Checkout(root).kata("stubs")
    assert written.code == 0, written
    return root


@pytest.fixture
def checkout(pristine: Path, tmp_path: Path) -> Checkout:
    """A miniature checkout whose learner files are stubs."""
    root = tmp_path / "checkout"
    shutil.copytree(pristine, root, ignore=shutil.ignore_patterns("__pycache__"))
    return Checkout(root)
