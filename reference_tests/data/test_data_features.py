"""Feature columns, texts, and windows of sequences."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys.data.dataset import Dataset
from recsys.data.features import (
    Feature,
    history_feature,
    item_features,
    item_texts,
    user_features,
)
from recsys.data.sequences import Sequences

DATA = Dataset(
    name="small",
    user=np.array([0, 2, 0, 2, 0, 3]),
    item=np.array([3, 1, 0, 2, 1, 3]),
    rating=np.ones(6, np.float32),
    time=np.array([1, 1, 2, 2, 3, 1]),
    user_ids=np.array([1, 2, 3, 4]),
    item_ids=np.array([10, 20, 30, 40]),
    titles=["American President, The (1995)", "Heat (1995)", "", "Misérables, Les (1998)"],
    years=np.array([1990, 2000, 0, 2002]),
    genre_names=["Comedy", "Drama", "War"],
    genres=np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=bool),
    user_features={"age": np.array([0, 6, 3, 3]), "gender": np.array([1, 0, 1, 1])},
    user_feature_sizes={"age": 7, "gender": 2},
)


def test_item_features_by_hand():
    features, columns = item_features(DATA)
    assert features == [
        Feature("item_id", "id", 5, table="item"),
        Feature("genres", "multi_hot", 4),
        Feature("year", "dense", 1),
    ]
    assert columns["item_id"].tolist() == [1, 2, 3, 4]
    assert columns["genres"].tolist() == [[1, 2], [3, 0], [0, 0], [2, 0]]
    assert columns["item_id"].dtype == columns["genres"].dtype == torch.int64
    year = columns["year"]
    assert year.shape == (4, 1) and year.dtype == torch.float32
    known = year[[0, 1, 3], 0]
    assert year[2, 0] == 0
    assert abs(known.mean().item()) < 1e-6 and abs(known.std(correction=0).item() - 1) < 1e-6
    assert known[0] < known[1] < known[2]


def test_columns_fit_their_tables():
    for features, columns in (item_features(DATA), user_features(DATA)):
        assert list(columns) == [feature.name for feature in features]
        for feature in features:
            if feature.kind != "dense":
                assert (
                    0 <= columns[feature.name].min() and columns[feature.name].max() < feature.size
                )


def test_what_is_unknown_for_all_is_left_out():
    bare = replace(DATA, years=np.zeros(4, int), genres=np.zeros((4, 3), bool), user_features={})
    assert list(item_features(bare)[1]) == ["item_id"]
    assert user_features(bare) == ([], {})
    same = replace(DATA, years=np.array([1990, 1990, 0, 1990]))
    assert item_features(same)[1]["year"].tolist() == [[0.0]] * 4


def test_user_features_by_hand():
    features, columns = user_features(DATA)
    assert features == [Feature("age", "id", 8), Feature("gender", "id", 3)]
    assert columns["age"].tolist() == [1, 7, 4, 4] and columns["gender"].tolist() == [2, 1, 2, 2]
    assert columns["age"].dtype == torch.int64


def test_history_shares_the_table_of_the_items():
    assert history_feature(DATA) == Feature("history", "history", 5, table="item")


def test_texts():
    assert item_texts(DATA) == [
        "The American President (1995). Comedy, Drama.",
        "Heat (1995). War.",
        "Unknown title.",
        "Les Misérables (1998). Drama.",
    ]


ROWS = np.array([0, 2, 4, 1, 3, 5])  # users 0 0 0 2 2 3, items 3 0 1 | 1 2 | 3


def test_sequences_by_hand():
    sequences = Sequences(DATA, ROWS)
    assert len(sequences) == 6
    assert sequences.items.tolist() == [4, 1, 2, 2, 3, 4]
    assert sequences.user.tolist() == [0, 0, 0, 2, 2, 3]
    assert sequences.start.tolist() == [0, 3, 3, 5, 6]
    windows = sequences.history(torch.arange(6), 2)
    assert windows.tolist() == [[0, 0], [4, 0], [1, 4], [0, 0], [2, 0], [0, 0]]
    assert windows.dtype == sequences.items.dtype == sequences.user.dtype == torch.int64
    assert sequences.history(torch.tensor([2, 4]), 4).tolist() == [[1, 4, 0, 0], [2, 0, 0, 0]]
    last = sequences.user_history(torch.tensor([3, 1, 0, 2]), 2)
    assert last.tolist() == [[4, 0], [0, 0], [2, 1], [3, 2]] and last.dtype == torch.int64
    values, offsets = sequences.seen()
    assert values.tolist() == [3, 0, 1, 1, 2, 3] and offsets.tolist() == [0, 3, 3, 5, 6]


def test_sequences_of_some_rows_only():
    sequences = Sequences(DATA, ROWS[3:5])
    assert sequences.start.tolist() == [0, 0, 0, 2, 2]
    assert sequences.user_history(torch.arange(4), 3).tolist() == [
        [0, 0, 0], [0, 0, 0], [3, 2, 0], [0, 0, 0]]  # fmt: skip
    empty = Sequences(DATA, ROWS[:0])
    assert empty.user_history(torch.arange(4), 2).tolist() == [[0, 0]] * 4


def test_windows_against_a_loop():
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(20, size=500))
    data = replace(DATA, user=user, item=rng.integers(90, size=500), time=np.arange(500),
                   user_ids=np.arange(20))  # fmt: skip
    sequences = Sequences(data, np.arange(500))
    position = rng.permutation(500)[:200]
    expected = []
    for at in position:
        before = [data.item[i] + 1 for i in range(at - 1, -1, -1) if user[i] == user[at]]
        expected.append((before + [0] * 7)[:7])
    assert sequences.history(torch.from_numpy(position), 7).tolist() == expected


def test_windows_to_learn_from_at_every_place():
    """Ends counted back from a user's last row; moved forward at random, never past it."""
    sequences = Sequences(DATA, ROWS)  # users 0 0 0 2 2 3, items 4 1 2 | 2 3 | 4
    assert sequences.window_ends(1).tolist() == [1, 2, 4]
    assert sequences.window_ends(2).tolist() == [2, 4]
    user = np.repeat([0, 1, 2], [9, 1, 4])
    data = replace(DATA, user=user, item=np.arange(14), time=np.arange(14),
                   user_ids=np.arange(20))  # fmt: skip
    sequences = Sequences(data, np.arange(14))
    ends = sequences.window_ends(3)
    assert ends.tolist() == [2, 5, 8, 13]
    torch.manual_seed(0)
    first = set()
    for _ in range(50):
        windows = sequences.windows(ends, 4)
        assert windows[2].tolist() == [9, 8, 7, 6] and windows[3].tolist() == [14, 13, 12, 11]
        assert all(bool((row[:-1] - row[1:] == 1).all()) for row in windows[:, :3])
        first.add(windows[0, 0].item())
    assert first == {3, 4, 5}, "as far as the next window begins"


def test_rows_out_of_order_are_refused():
    for rows in ([1, 0], [2, 0]):
        with pytest.raises(ValueError, match="sorted by user"):
            Sequences(DATA, np.array(rows))


def test_windows_stay_on_the_device_and_do_not_loop():
    """On the meta device nothing has values: an .item(), a .tolist() or a copy would fail."""
    sequences = Sequences(DATA, ROWS, device="meta")
    windows = sequences.history(torch.zeros(5, dtype=torch.int64, device="meta"), 3)
    assert windows.device.type == "meta" and windows.shape == (5, 3)
    assert sequences.seen()[0].device.type == "meta"
