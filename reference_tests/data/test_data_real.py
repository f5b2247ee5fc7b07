"""The published MovieLens sets, where they are at hand; none of their rows is committed."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from recsys.data.features import item_features, item_texts, user_features
from recsys.data.load import load
from recsys.data.sequences import Sequences
from recsys.data.splits import chronological_order, leave_last_one_out

ROOT = Path(__file__).resolve().parents[2]
PLACES = [Path(os.environ.get("KATA_DATA") or ROOT), ROOT.parent / "shared" / "data" / "movielens"]


def folder(name):
    for place in PLACES:
        if (place / name).is_dir():
            return place / name
    pytest.skip(f"{name} is not here; set KATA_DATA to the folder that holds it")


SIZES = {  # users, items with a rating, ratings, genres, items without a genre, without a year
    "ml-100k": (943, 1_682, 100_000, 18, 2, 1),
    "ml-latest-small": (610, 9_724, 100_836, 19, 34, 12),
    "ml-1m": (6_040, 3_706, 1_000_209, 18, 0, 0),
}
POPULARITY = {"ml-100k": 0.04499, "ml-latest-small": 0.01943, "ml-1m": 0.01787}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_published_set(name):
    path = folder(name)
    begin = time.process_time()
    data = load(path)
    item_features(data), user_features(data)
    seconds = time.process_time() - begin
    assert seconds < 3, f"{name} took {seconds:.1f} s of CPU to load"
    assert (
        data.num_users,
        data.num_items,
        data.num_interactions,
        len(data.genre_names),
        (~data.genres.any(axis=1)).sum(),
        (data.years == 0).sum(),
    ) == SIZES[name]
    assert any("Misérables" in title for title in data.titles)
    assert all(item_texts(data))
    if name == "ml-latest-small":
        assert data.user_features == {} and data.rating.min() == 0.5
    else:
        sizes = {"age": 7, "gender": 2, "occupation": 21, "zip": 11}
        assert data.user_feature_sizes == sizes
        counts = np.bincount(data.user_features["gender"])  # as the READMEs have it
        assert counts.tolist() == ([273, 670] if name == "ml-100k" else [1_709, 4_331])
    reconstructed = name == "ml-1m" and not (path / "ratings.dat").exists()
    assert any("reconstruction" in note for note in data.notes) == reconstructed

    order = chronological_order(data)
    user, at = np.diff(data.user[order]), np.diff(data.time[order])
    assert (user >= 0).all() and (at[user == 0] >= 0).all()
    assert (np.diff(order)[(user == 0) & (at == 0)] > 0).all()  # ties in the order of the file
    split = leave_last_one_out(data)
    train = np.concatenate([split.train, split.validation])
    assert len(split.test) == len(split.validation) == data.num_users
    popularity = np.bincount(data.item[train], minlength=data.num_items)
    seen = np.zeros((data.num_users, data.num_items), dtype=bool)
    seen[data.user[train], data.item[train]] = True
    score = np.where(seen, -1, popularity)[data.user[split.test]]
    rank = (score > score[np.arange(len(score)), data.item[split.test]][:, None]).sum(axis=1)
    ndcg = np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean()
    assert abs(ndcg - POPULARITY[name]) < 1e-4  # ties between scores count for the target here
    assert len(Sequences(data, split.train)) == len(split.train)
