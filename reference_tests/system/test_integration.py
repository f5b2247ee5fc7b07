"""docs/integration.md and the margins: what they are made of is what they say."""

import copy

import numpy as np
import pytest

from harness import catalog, system
from reference_tests.integration import margins, table
from reference_tests.strength import catalogue

ROW = {
    "alternates": {},
    "verdict": "red",
    "reds": ["final"],
    "says": "NDCG@10 is worse",
    "figures": {"final": [-0.5, 0.1, 0.2, -9.0], "recall": [0.001, 0.5, 0.5, 0.1]},
    "margins": {"final": 0.03, "recall": 0.03},
    "costs": {},
    "culprit": {"others": 8, "named": ["02_tower"], "together": [], "says": ["02_tower costs 50%"]},
    "seconds": 20.0,
    "made": "2026-11-29, Python 3.11.7",
}


def test_the_page_is_what_was_measured():
    assert table.DOCUMENT.read_text(encoding="utf-8") == table.page(table.stored()), (
        "python -m reference_tests.integration table --render"
    )


def test_rows_are_of_what_is_there():
    rows = table.stored()
    assert list(rows) == [name for name in table.names() if name in rows]
    assert "reference" in rows
    for name, row in rows.items():
        for kata, alternate in row["alternates"].items():
            known = [each.id for each in catalogue.alternates_of(catalog.find(kata))]
            assert alternate in known, name


def test_right_systems_are_red_for_their_cost_alone():
    rows = table.stored()
    assert rows["reference"]["verdict"] == "green"
    for name, row in rows.items():
        if ":" in name:
            assert {table.GROUPS.get(red) for red in row["reds"]} <= set(table.COSTS), name


def test_mixes_of_what_is_green_alone_are_green():
    rows = table.stored()
    for name in table.MIXES:
        assert name not in rows or rows[name]["verdict"] == "green", rows[name]["says"]


def test_a_mix_is_drawn_from_what_is_not_red_alone():
    first = table.mix("mix 1", {})
    assert first != table.mix("mix 2", {})
    red = {f"{kata}:{name}": {"verdict": "red"} for kata, name in first.items()}
    second = table.mix("mix 1", red)
    assert all(second[kata] != first[kata] for kata in first)
    assert {f"{kata}:{name}" for kata, name in second.items()} < set(table.missing(red))
    assert not set(red) & set(table.missing(red))


def row(**changes):
    return copy.deepcopy(ROW) | changes


def test_what_moved_is_what_leaves_chance_behind():
    said = table.moved(row())
    half = 0.03 * table.Z / table.margins()["z"]
    assert said == [f"final NDCG@10 -50% [{-0.5 - half:+.0%}, {-0.5 + half:+.0%}]"]
    slow = row(figures={}, reds=["speed_step"], costs={"step": 3.04, "encode": 1.01})
    assert table.moved(slow)[0] == "step 3.0×"
    assert table.moved(row(figures={}, reds=["seen"], says="lists of | seen items")) == [
        "lists of \\| seen items"
    ]


def test_a_part_that_is_blamed_wrongly_is_counted():
    right, wrong = row(), row(culprit=ROW["culprit"] | {"named": ["06_ndcg"]})
    nobody = row(culprit=ROW["culprit"] | {"named": []})
    said = table.who({"02_tower/a": right, "02_tower/b": wrong, "02_tower/c": nobody})
    assert said.startswith("of 1 of these") and said.endswith("blamed in 1.")


# --- margins --------------------------------------------------------------------------------------


def world(draw, shift=0.0):
    """Figures of four runs of 400 users; the first two are better by `shift`."""
    names = (*system.FIGURES, "popularity")
    return [
        {name: draw.standard_normal(400) + shift * (i < 2) for name in names}
        for i in range(margins.RUNS)
    ]


@pytest.fixture
def draw():
    return np.random.default_rng(0)


def test_the_spread_is_that_of_a_difference(draw):
    found = margins.fixture([world(draw) for _ in range(10)])
    for name, spread in found["spread"].items():
        assert 1.3 < spread < 1.9, name  # of two normal values, widened by chance
    assert found["false_alarms"]["verdicts"] == 30 and found["false_alarms"]["red"] <= 1


def test_a_verdict_is_judged_by_other_worlds(draw):
    """One world lies far off: by margins that it took part in it would be green."""
    worlds = [world(draw), world(draw, shift=0.6)]
    found = margins.fixture(worlds)
    own = margins.distances(worlds[-1:], margins.fitted(worlds))
    assert max(abs(z) for each in own.values() for z in each) < margins.Z
    assert found["false_alarms"]["red"] == 1
    low, high = found["false_alarms"]["interval_95"]
    assert low < 1 / 6 < high


def test_the_interval_of_a_share():
    """Of textbooks: none of 30, 1 of 10."""
    low, high = margins.clopper_pearson(0, 30)
    assert low == 0 and abs(high - 0.1157) < 1e-3
    low, high = margins.clopper_pearson(1, 10)
    assert abs(low - 0.0025) < 1e-3 and abs(high - 0.4450) < 1e-3
