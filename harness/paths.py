"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

KATAS = ROOT / "katas"
SRC = ROOT / "src"
FIXTURES = ROOT / "fixtures"
CONFIGS = ROOT / "configs"
PROGRESS = ROOT / "progress"
REFERENCE_TESTS = ROOT / "reference_tests"
REFERENCE = REFERENCE_TESTS / "solution"  # holds recsys/..., like src
STATE = ROOT / ".kata"  # git-ignored: the record, the logs, what is derived
