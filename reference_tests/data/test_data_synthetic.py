"""The synthetic world: reproducible, well formed, and worth learning from."""

from dataclasses import fields

import numpy as np
import pytest

from recsys.data.load import load
from recsys.data.splits import leave_last_one_out
from recsys.data.synthetic import generate


@pytest.fixture(scope="module")
def data():
    return load("synthetic", seed=0)


def equal(one, other, name):
    one, other = getattr(one, name), getattr(other, name)
    if isinstance(one, dict):
        return list(one) == list(other) and all(np.array_equal(one[k], other[k]) for k in one)
    return np.array_equal(one, other)


def test_the_seed_decides(data):
    again, other = load("synthetic", seed=0), load("synthetic", seed=1)
    assert all(equal(data, again, field.name) for field in fields(data))
    changed = ("user", "item", "rating", "time", "titles", "genres", "user_features")
    assert not any(equal(data, other, name) for name in changed)


def test_no_global_random_state():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    generate(3, users=20, items=60)
    assert (np.random.get_state()[1] == before).all()


def test_it_is_well_formed(data):
    assert data.name == "synthetic"
    assert 550 <= data.num_users <= 650 and 700 <= data.num_items <= 800
    assert 33_000 <= data.num_interactions <= 47_000
    columns = (data.user, data.item, data.time, data.user_ids, data.item_ids, data.years)
    assert all(column.dtype == np.int64 for column in columns)
    assert data.rating.dtype == np.float32 and set(data.rating) == {1, 2, 3, 4, 5}
    assert (np.diff(data.item_ids) > 0).all() and (np.diff(data.time) >= 0).all()
    assert np.bincount(data.item, minlength=data.num_items).min() > 0
    assert np.bincount(data.user).min() >= 20
    assert len(np.unique(data.user * data.num_items + data.item)) == data.num_interactions
    assert data.genres.shape == (data.num_items, len(data.genre_names))
    assert data.genres.any(axis=1).all() and data.genres.dtype == bool
    assert len(set(data.titles)) == data.num_items
    assert all(f"({year})" in title for title, year in zip(data.titles, data.years, strict=True))
    for name, size in data.user_feature_sizes.items():
        assert data.user_features[name].shape == (data.num_users,)
        assert 0 <= data.user_features[name].min() and data.user_features[name].max() < size


def test_ties_in_time_are_as_common_as_in_real_data(data):
    rows = np.lexsort((data.time, data.user))
    same_user = np.diff(data.user[rows]) == 0
    assert 0.25 < (np.diff(data.time[rows])[same_user] == 0).mean() < 0.5


def ndcg(data, score, test, train):
    score = score.astype(float)
    score[data.user[train], data.item[train]] = -np.inf
    score = score[data.user[test]]
    rank = (score > score[np.arange(len(test)), data.item[test]][:, None]).sum(axis=1)
    return np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()


def parts(data):
    split = leave_last_one_out(data)
    train = np.setdiff1d(np.arange(data.num_interactions), split.test)
    train = train[np.lexsort((data.time[train], data.user[train]))]
    popularity = np.bincount(data.item[train], minlength=data.num_items)
    same = data.user[train][1:] == data.user[train][:-1]
    one, two = data.item[train][:-1][same], data.item[train][1:][same]
    last = np.zeros(data.num_users, int)
    last[data.user[train]] = data.item[train]  # the last assignment stays
    return split.test, train, popularity, one, two, last


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sequence_goes_far_beyond_popularity(seed):
    """A transition table of the titles' first words is twice as good as popularity."""
    data = load("synthetic", seed=seed)
    test, train, popularity, one, two, last = parts(data)
    by_popularity = ndcg(data, np.tile(popularity, (data.num_users, 1)), test, train)
    words, word = np.unique([title.split()[0] for title in data.titles], return_inverse=True)
    table = np.zeros((len(words), len(words)))
    np.add.at(table, (word[one], word[two]), 1)
    table /= np.bincount(word, weights=popularity)
    by_sequence = ndcg(data, table[word[last]][:, word] * popularity, test, train)
    assert 0.01 < by_popularity < 0.06
    assert by_sequence > 2 * by_popularity


def test_taste_is_planted(data):
    """How much a user likes a genre early tells how much of it there is late."""
    rows = np.lexsort((data.time, data.user))
    place = np.arange(len(rows)) - np.searchsorted(data.user[rows], data.user[rows])
    early = place < np.bincount(data.user)[data.user[rows]] // 2
    profile = []
    for half in (early, ~early):
        counts = np.zeros((data.num_users, data.genres.shape[1]))
        np.add.at(counts, data.user[rows][half], data.genres[data.item[rows][half]])
        share = counts / counts.sum(axis=1, keepdims=True)
        profile.append(share - share.mean(axis=0))
    assert np.corrcoef(profile[0].ravel(), profile[1].ravel())[0, 1] > 0.5


def test_user_features_tell_of_taste(data):
    """Users of one occupation choose more alike than users drawn at random."""
    counts = np.zeros((data.num_users, data.genres.shape[1]))
    np.add.at(counts, data.user, data.genres[data.item])
    share = counts / counts.sum(axis=1, keepdims=True)
    share = (share - share.mean(axis=0)) / share.std(axis=0)
    alike = share @ share.T / share.shape[1]
    same = data.user_features["occupation"][:, None] == data.user_features["occupation"]
    np.fill_diagonal(same, False)
    assert alike[same].mean() > 0.05


def test_popularity_drifts(data):
    """What is popular in the first third of the time is less so in the last third."""
    thirds = np.array_split(np.arange(data.num_interactions), 9)  # rows are in order of time
    counts = [np.bincount(data.item[rows], minlength=data.num_items) for rows in thirds]
    near = np.mean([np.corrcoef(counts[k], counts[k + 1])[0, 1] for k in range(8)])
    far = np.mean([np.corrcoef(counts[k], counts[k + 6])[0, 1] for k in range(3)])
    assert near > far + 0.1


def test_fresh_films_are_watched_more(data):
    """Films that come out meanwhile: the first 90 days against the 90 days after."""
    day = 86_400
    first = np.full(data.num_items, data.time.max())
    np.minimum.at(first, data.item, data.time)
    meanwhile = (data.years >= 2000) & (first < data.time.max() - 360 * day)
    age = (data.time - first[data.item])[meanwhile[data.item]] // day
    assert (age < 90).sum() > 1.8 * ((age >= 180) & (age < 270)).sum()


def test_ratings_agree_with_taste(data):
    """A user's mean rating of a genre goes with how often it is chosen."""
    chosen = np.zeros((data.num_users, data.genres.shape[1]))
    stars = np.zeros_like(chosen)
    np.add.at(chosen, data.user, data.genres[data.item])
    np.add.at(stars, data.user, data.genres[data.item] * data.rating[:, None])
    enough = chosen >= 5
    mean = stars / np.maximum(chosen, 1)
    mean -= (np.bincount(data.user, data.rating) / np.bincount(data.user))[:, None]
    assert np.corrcoef(mean[enough], np.log(chosen[enough]))[0, 1] > 0.2
