"""From tables as read to a `Dataset`: numbering, joining, and the checks across files."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from recsys.data.dataset import Dataset
from recsys.data.errors import DataError


@dataclass(frozen=True)
class Ratings:
    file: str  # for messages
    user: np.ndarray  # (n,) raw ids
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray


@dataclass(frozen=True)
class Movies:
    file: str
    ids: np.ndarray  # (m,) raw ids, any order
    titles: np.ndarray  # (m,) str
    years: np.ndarray  # (m,) int64, 0 unknown
    genre_names: list[str]
    genres: np.ndarray  # (m, G) bool


@dataclass(frozen=True)
class Users:
    file: str
    ids: np.ndarray  # (k,) raw ids, any order
    features: dict[str, np.ndarray] = field(default_factory=dict)  # (k,) codes
    sizes: dict[str, int] = field(default_factory=dict)


def assemble(
    name: str, ratings: Ratings, movies: Movies, users: Users | None, notes: tuple[str, ...] = ()
) -> Dataset:
    """Number users and items, join the side tables to them.

    Raises `DataError` if a (user, item, time) row stands twice, if an id stands twice in a side
    table, or if a user who rated is not in the user file. A rated item that the movie file does
    not know keeps its ratings, with an empty title, and a note says so.
    """
    user, user_ids = pd.factorize(ratings.user, sort=True)
    item, item_ids = pd.factorize(ratings.item, sort=True)
    notes += _check_repeats(ratings, user, item, len(item_ids))

    row, found = _locate(item_ids, movies.ids, movies.file)
    titles = np.where(found, movies.titles[row], "")
    if not found.all():
        notes += (
            f"{(~found).sum()} rated items are not in {movies.file} "
            f"(the first: {item_ids[~found][0]}); they have no title, year or genre",
        )
    features = {}
    if users is not None:
        row_of_user, known = _locate(user_ids, users.ids, users.file)
        if not known.all():
            raise DataError(
                f"user {user_ids[~known][0]} has ratings in {ratings.file} but no line in "
                f"{users.file}, which must have one for every user."
            )
        features = {key: codes[row_of_user] for key, codes in users.features.items()}
    return Dataset(
        name=name,
        user=user.astype(np.int64, copy=False),
        item=item.astype(np.int64, copy=False),
        rating=ratings.rating.astype(np.float32, copy=False),
        time=ratings.time.astype(np.int64, copy=False),
        user_ids=np.asarray(user_ids, dtype=np.int64),
        item_ids=np.asarray(item_ids, dtype=np.int64),
        titles=titles.tolist(),
        years=np.where(found, movies.years[row], 0),
        genre_names=movies.genre_names,
        genres=movies.genres[row] & found[:, None],
        user_features=features,
        user_feature_sizes=users.sizes if users is not None else {},
        notes=notes,
    )


def _check_repeats(
    ratings: Ratings, user: np.ndarray, item: np.ndarray, num_items: int
) -> tuple[str, ...]:
    """Refuse rows that stand twice; note items that a user rated again at another time."""
    pair = pd.Series(user.astype(np.int64) * num_items + item)
    again = pair.duplicated(keep=False).to_numpy()  # hashing: linear in the rows
    if not again.any():
        return ()
    rows = np.flatnonzero(again)
    table = pd.DataFrame({"pair": pair[rows].to_numpy(), "time": ratings.time[rows]})
    twice = table.duplicated().to_numpy()
    if twice.any():
        row = rows[twice.argmax()]
        raise DataError(
            f"{ratings.file}: the rating of item {ratings.item[row]} by user {ratings.user[row]} "
            f"at time {ratings.time[row]} stands there more than once ({twice.sum()} repeated rows "
            "in all). Remove the repeated rows: they would stand in training and test at once."
        )
    repeats = len(table) - table["pair"].nunique()
    return (f"{repeats} ratings are of an item that the same user has rated at another time",)


def _locate(wanted: np.ndarray, ids: np.ndarray, file: str) -> tuple[np.ndarray, np.ndarray]:
    """For each of the `wanted` ids its row among `ids`, and whether it is there (else row 0)."""
    index = pd.Index(ids)
    if not index.is_unique:
        raise DataError(f"{file}: id {ids[index.duplicated()][0]} stands there more than once.")
    row = index.get_indexer(wanted)
    return np.maximum(row, 0), row >= 0
