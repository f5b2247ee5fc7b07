"""`kata bench --cold`: what others do, by their definitions, and what is known of cold items."""

import numpy as np
import pytest

from harness import evaluator
from harness.bench import cold

USERS, ITEMS, WIDTH = 7, 9, 4


@pytest.fixture(scope="module")
def world():
    """Who chose what, which items are warm, text vectors and genres."""
    rng = np.random.default_rng(4)
    warm = np.arange(ITEMS) % 4 != 3
    table = ((rng.random((USERS, ITEMS)) < 0.5) & warm).astype(float)
    table[np.arange(USERS), 0], table[0, warm] = 1.0, 1.0  # everybody chose, and was chosen
    genres = rng.random((ITEMS, 3)) < 0.5
    genres[3], genres[7] = False, [True, False, False]
    return table, warm, rng.standard_normal((ITEMS, WIDTH)), genres


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_genre_popularity(world):
    table, warm, _, genres = world
    scores = cold.genre_popularity(table, genres.astype(float), warm)
    assert scores.shape == (USERS, ITEMS) and (scores == scores[0]).all()
    counts = table.sum(0)
    for item in range(ITEMS):
        means = [
            np.mean([counts[i] for i in range(ITEMS) if warm[i] and genres[i, g]])
            for g in np.flatnonzero(genres[item])
        ]
        expected = np.mean(means) if means else counts[warm].mean()
        assert scores[0, item] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["content cosine", "content cosine, centred"])
def test_cosines_order_as_the_definition_does(world, name):
    table, warm, raw, genres = world
    config = {"user_ridge": 2.0, "factors": 3, "factor_ridge": 1.0}
    scores = cold.baselines(table, warm, raw, genres, config, 0)[name]
    vectors = raw - raw.mean(0) if "centred" in name else raw
    for user in range(USERS):
        profile = sum(unit(vectors[i]) for i in range(ITEMS) if table[user, i])
        cosine = np.array([unit(profile) @ unit(v) for v in vectors])
        np.testing.assert_allclose(scores[user], cosine * np.linalg.norm(profile), atol=1e-12)


def test_ridge_for_each_user_is_its_least_squares(world):
    """Intercept free, weights penalised: by an extended least squares problem for each user."""
    table, warm, raw, _ = world
    scores = cold.ridge(raw, table.T, warm, 2.0).T
    middle = raw[warm].mean(0)
    for user in range(USERS):
        rows = np.c_[np.ones(warm.sum()), raw[warm] - middle]
        extended = np.r_[rows, np.sqrt(2.0) * np.eye(WIDTH + 1)[1:]]
        weight = np.linalg.lstsq(extended, np.r_[table[user, warm], np.zeros(WIDTH)], rcond=None)[0]
        np.testing.assert_allclose(scores[user], np.c_[np.ones(ITEMS), raw - middle] @ weight)


def test_text_to_all_factors_is_the_ridge_for_each_user(world):
    """With every factor kept the decomposition changes nothing."""
    table, warm, raw, _ = world
    found = cold.text_to_factors(table, raw, warm, 99, 2.0)
    np.testing.assert_allclose(found, cold.ridge(raw, table.T, warm, 2.0).T, atol=1e-9)
    assert np.abs(cold.text_to_factors(table, raw, warm, 2, 2.0) - found).max() > 1e-3


def test_lists_hold_cold_items_and_nothing_known(world):
    table, warm, raw, _ = world
    scores = np.random.default_rng(0).random((USERS, ITEMS))
    unknown = np.flatnonzero(~warm)
    lists = cold.best(scores, table, unknown)
    for user in range(USERS):
        assert lists["cold"][user].tolist() == sorted(unknown, key=lambda i: -scores[user, i])
        fresh = np.flatnonzero(table[user] == 0)
        expected = sorted(fresh, key=lambda i: -scores[user, i])
        assert lists["all"][user, : len(fresh)].tolist() == expected


def test_recalls_and_their_interval():
    lists = np.array([[3, 4], [4, 5], [3, 5]])
    user, item = np.array([0, 0, 2]), np.array([3, 5, 5])
    np.testing.assert_array_equal(cold.recalls(lists, user, item), [0.5, np.nan, 1.0])
    gains = np.random.default_rng(1).standard_normal((3, 400)) * 0.1 + 0.5
    gains[1, ::3] = np.nan
    low, high = cold.interval(gains)
    assert low < np.nanmean(gains) < high and high - low < 0.03
    repeated = cold.interval(np.tile(gains[:1], (3, 1)))  # the same users again tell nothing new
    assert np.diff(repeated) == pytest.approx(np.diff(evaluator.bootstrap_interval(gains[0])), 0.15)


def test_a_data_set_has_one_section_in_the_record():
    both = cold.merged(cold.merged("# Cold start\n\nwords\n", "## a\n\nold\n"), "## b\n\nb\n")
    assert both == "# Cold start\n\nwords\n\n## a\n\nold\n\n## b\n\nb\n"
    assert cold.merged(both, "## a\n\nnew\n") == (
        "# Cold start\n\nwords\n\n## b\n\nb\n\n## a\n\nnew\n"
    )
