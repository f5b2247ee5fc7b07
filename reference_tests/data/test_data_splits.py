"""Splits and tie rules."""

from dataclasses import replace

import numpy as np
import pytest

from recsys.data.dataset import Dataset
from recsys.data.splits import (
    SPLITS,
    chronological_order,
    global_time,
    item_cold_start,
    leave_last_one_out,
    make_split,
    random_per_user,
)


def dataset(user, item, time):
    user, item, time = (np.array(column, dtype=np.int64) for column in (user, item, time))
    users, items = user.max() + 1, item.max() + 1
    return Dataset(
        name="small", user=user, item=item, rating=np.ones(len(user), np.float32), time=time,
        user_ids=np.arange(users) * 3 + 5, item_ids=np.arange(items) * 7 + 1,
        titles=[""] * items, years=np.zeros(items, np.int64), genre_names=[],
        genres=np.zeros((items, 0), bool),
    )  # fmt: skip


def random_dataset(seed=0, users=50, items=300, rows=2000, times=100):
    rng = np.random.default_rng(seed)
    cells = rng.permutation(users * items)[:rows]
    return dataset(cells // items, cells % items, rng.integers(times, size=rows))


# seed 0, user id 5, item ids 1, 8, ... 50; computed with Python's own integers
HASH_ORDER = [4, 5, 1, 6, 3, 7, 0, 2]

#                user 0: rows 0 3 5 6 at 9 2 2 5;  user 1: rows 1 4 at 4 4;  user 2: row 2
SMALL = dataset([0, 1, 2, 0, 1, 0, 0], [3, 4, 0, 2, 1, 0, 4], [9, 4, 7, 2, 4, 2, 5])


def test_order_by_user_then_time_then_row():
    assert chronological_order(SMALL).tolist() == [3, 5, 6, 0, 1, 4, 2]


def test_leave_last_one_out_by_hand():
    split = leave_last_one_out(SMALL)
    assert (split.name, split.ties) == ("leave_last_one_out", "row")
    assert split.test.tolist() == [0, 4]  # user 1 has two rows: the later one in the file
    assert split.validation.tolist() == [6]
    assert split.train.tolist() == [3, 5, 1, 2]  # user 2 only trains
    assert split.cold_items.tolist() == []


def test_item_ids_break_no_ties():
    """All of a user's rows share one second: the order is the file's, whatever the item ids."""
    rng = np.random.default_rng(1)
    item = rng.permutation(200)
    data = dataset(np.zeros(200), item, np.full(200, 5))
    assert chronological_order(data).tolist() == list(range(200))
    renamed = replace(data, item=199 - item)
    assert chronological_order(renamed).tolist() == list(range(200))
    by_hash = item[chronological_order(data, "hash")]
    assert abs(np.corrcoef(by_hash, np.arange(200))[0, 1]) < 0.2
    assert abs(np.corrcoef(chronological_order(data, "hash"), np.arange(200))[0, 1]) < 0.2


def test_hash_ties_depend_on_seed_user_and_item_only():
    data = random_dataset(times=3)
    order = chronological_order(data, "hash", seed=3)
    pairs = list(zip(data.user[order], data.item[order], strict=True))
    shuffled = np.random.default_rng(0).permutation(len(data.user))
    moved = dataset(data.user[shuffled], data.item[shuffled], data.time[shuffled])
    again = chronological_order(moved, "hash", seed=3)
    assert pairs == list(zip(moved.user[again], moved.item[again], strict=True))
    other = chronological_order(data, "hash", seed=4)
    assert not np.array_equal(order, other)
    for rows in (order, other):  # ties only: time goes first
        assert (np.lexsort((data.time[rows], data.user[rows])) == np.arange(len(rows))).all()
    # two users with the same items at the same times have different orders
    twins = dataset(np.repeat([0, 1], 60), np.tile(np.arange(60), 2), np.zeros(120))
    rows = chronological_order(twins, "hash")
    assert not np.array_equal(twins.item[rows[:60]], twins.item[rows[60:]])


def test_the_hash_is_the_same_on_every_machine():
    data = dataset(np.zeros(8), np.arange(8), np.zeros(8))
    assert chronological_order(data, "hash", seed=0).tolist() == HASH_ORDER


def test_unknown_names():
    with pytest.raises(ValueError, match="row, hash"):
        chronological_order(SMALL, "id")
    with pytest.raises(ValueError, match="leave_last_one_out"):
        make_split(SMALL, "random")


@pytest.mark.parametrize("ties", ["row", "hash"])
@pytest.mark.parametrize("name", sorted(SPLITS))
def test_parts_are_disjoint_complete_and_ordered(name, ties):
    for seed in range(3):
        data = random_dataset(seed)
        split = make_split(data, name, ties=ties, seed=seed)
        assert (split.name, split.ties) == (name, ties)
        rows = np.concatenate([split.train, split.validation, split.test])
        assert sorted(rows.tolist()) == list(range(len(data.user)))
        place = np.empty(len(rows), int)
        place[chronological_order(data, ties, seed)] = np.arange(len(rows))
        for part in (split.train, split.validation, split.test):
            assert part.dtype == np.int64 and (np.diff(place[part]) > 0).all()
        assert len(split.train) and len(split.test)


def test_leave_last_one_out_never_looks_ahead():
    data = random_dataset(5)
    split = leave_last_one_out(data)
    for user in range(data.num_users):
        train, validation, test = (
            data.time[part[data.user[part] == user]]
            for part in (split.train, split.validation, split.test)
        )
        assert len(test) == len(validation) == 1
        assert train.max() <= validation[0] <= test[0]


def test_global_time_cuts_between_seconds():
    data = random_dataset(2)
    split = global_time(data, validation=0.2, test=0.1)
    newest = data.time[split.train].max(), data.time[split.validation].max()
    assert newest[0] < data.time[split.validation].min()
    assert newest[1] < data.time[split.test].min()
    assert 200 <= len(split.test) < 250 and 600 <= len(split.validation) + len(split.test) < 650
    exact = dataset(np.arange(10) % 3, np.arange(10), np.arange(10)[::-1])
    split = global_time(exact, validation=0.2, test=0.3)
    assert sorted(split.test) == [0, 1, 2] and sorted(split.validation) == [3, 4]
    assert len(global_time(exact, validation=0, test=0.3).validation) == 0
    assert len(global_time(exact, validation=0.3, test=0).test) == 0


def test_global_time_without_training_rows_is_an_error():
    with pytest.raises(ValueError, match="no training rows"):
        global_time(dataset([0, 0, 1], [0, 1, 0], [5, 5, 5]))


def test_random_per_user_takes_its_share_of_each_user():
    data = random_dataset(3)
    split = random_per_user(data, validation=0.2, test=0.1, seed=1)
    count = np.bincount(data.user)
    assert np.bincount(data.user[split.test]).tolist() == np.floor(count * 0.1 + 0.5).tolist()
    assert np.bincount(data.user[split.validation]).tolist() == np.floor(count * 0.2 + 0.5).tolist()
    other = random_per_user(data, validation=0.2, test=0.1, seed=2)
    assert not np.array_equal(split.test, other.test)
    assert np.array_equal(split.test, random_per_user(data, validation=0.2, test=0.1, seed=1).test)
    # random, not the last ones: as likely early as late
    place = np.empty(len(data.user), int)
    place[chronological_order(data)] = np.arange(len(data.user))
    first = np.cumsum(count) - count
    share = (place - first[data.user]) / count[data.user]
    assert abs(share[split.test].mean() - 0.5) < 0.1
    lone = random_per_user(SMALL, validation=0.4, test=0.5)
    assert set(SMALL.user[lone.train].tolist()) == {0, 1, 2}  # everyone keeps a training row


def test_cold_items_are_unseen_in_training():
    data = random_dataset(4)
    split = item_cold_start(data, fraction=0.2, validation=0.1, seed=0)
    assert len(split.cold_items) == round(data.num_items * 0.2)
    assert (np.diff(split.cold_items) > 0).all()
    assert set(data.item[split.test].tolist()) == set(split.cold_items.tolist()) & set(data.item)
    train, validation = set(data.item[split.train]), set(data.item[split.validation])
    assert not train & set(split.cold_items.tolist()) and not train & validation
    assert not validation & set(split.cold_items.tolist()) and validation
    assert not np.array_equal(split.cold_items, item_cold_start(data, seed=1).cold_items)
    assert len(item_cold_start(data).validation) == 0


@pytest.mark.parametrize("name", ["global_time", "random_per_user"])
@pytest.mark.parametrize(
    "options", [{"test": 1.0}, {"test": -0.1}, {"test": 0.5, "validation": 0.5}]
)
def test_impossible_fractions(name, options):
    with pytest.raises(ValueError, match="fractions"):
        make_split(SMALL, name, **options)
