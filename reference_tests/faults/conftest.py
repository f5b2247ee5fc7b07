"""How often what was tried, and what happened: counted by the tests, written for the table.

KATA_FAULTS=FILE: the long form, whose counts go to FILE (see __main__.py); without it the short
form, a part of the usual tests. KATA_ORDER=SEED: all tests in a random order.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from reference_tests.faults.table import AREAS, ELSEWHERE

COUNTS: dict[tuple[str, str], Counter] = {}


@pytest.fixture
def often():
    """How often something is tried: `often(short, long)`."""
    return lambda short, long: long if os.environ.get("KATA_FAULTS") else short


@pytest.fixture
def tally(request):
    """`tally(what, happened, times=1)` counts in the area that the module is named after."""
    area = AREAS[Path(request.node.path).stem.removeprefix("test_")]

    def count(what: str, happened: str, times: int = 1) -> None:
        COUNTS.setdefault((area, what), Counter())[happened] += times

    return count


class Reports:
    """A plugin of its own: hooks of this file would be told of the tests in this folder only."""

    @staticmethod
    def pytest_runtest_logreport(report: pytest.TestReport) -> None:
        """A test that is red is in the table; so is what tests elsewhere show."""
        for (area, what), files in ELSEWHERE.items():
            if report.nodeid.startswith(files):
                if report.when == "call" or report.outcome == "failed":
                    happened = "as expected" if report.passed else report.outcome
                    COUNTS.setdefault((area, what), Counter())[happened] += 1
                return
        if report.failed and "/faults/" in report.nodeid:
            file, _, name = report.nodeid.partition("::")
            area = AREAS[Path(file).stem.removeprefix("test_")]
            COUNTS.setdefault((area, name), Counter())["RED"] += 1


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reports())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With KATA_ORDER: files in a random order, and the tests of each file in one."""
    seed = os.environ.get("KATA_ORDER")
    if seed is None:
        return
    rng = random.Random(seed)
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    groups = list(files.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    items[:] = [item for group in groups for item in group]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("KATA_FAULTS"):
        rows = [[area, what, counts] for (area, what), counts in COUNTS.items()]
        Path(os.environ["KATA_FAULTS"]).write_text(json.dumps(rows), encoding="utf-8")
