"""Who is trained on, who is tuned on, who is tested on.

About half of the consecutive ratings of a MovieLens user share a timestamp. Such ties are never
broken by item id: the order of ids would tell a model that the next id is higher. They are broken
by the order of the rows in the file ("row"), or, as a control, by a seeded hash ("hash").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from recsys.data.dataset import Dataset

TIES = ("row", "hash")


@dataclass(frozen=True, eq=False)
class Split:
    """Disjoint rows of a data set, each part sorted by user and then chronologically."""

    name: str
    ties: str
    train: np.ndarray  # (.,) int64
    validation: np.ndarray
    test: np.ndarray
    cold_items: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


def chronological_order(dataset: Dataset, ties: str = "row", seed: int = 0) -> np.ndarray:
    """(n,) int64: all rows sorted by user, then time, then as `ties` says.

    "row": the order of the rows in the file. "hash": by a hash of (seed, user id, item id), which
    knows neither the file's order nor the ids' order.
    """
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, not {ties!r}.")
    # the last one sorts first; lexsort is stable
    keys: tuple[np.ndarray, ...] = (dataset.time, dataset.user)
    if ties == "hash":
        user, item = dataset.user_ids[dataset.user], dataset.item_ids[dataset.item]
        keys = (_hash(_hash(_hash(np.asarray(seed)) ^ _hash(user)) + _hash(item)), *keys)
    return np.lexsort(keys)


def leave_last_one_out(dataset: Dataset, *, ties: str = "row", seed: int = 0) -> Split:
    """Of every user the last interaction is test, the one before it validation.

    A user with two interactions has no validation, one with a single interaction only trains.
    """
    order = chronological_order(dataset, ties, seed)
    count, position = _within_user(dataset, order)
    left = count - position  # 1 for a user's last
    test = (left == 1) & (count >= 2)
    validation = (left == 2) & (count >= 3)
    return _split("leave_last_one_out", ties, order, validation, test)


def global_time(
    dataset: Dataset,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    ties: str = "row",
    seed: int = 0,
) -> Split:
    """The newest `test` of all rows, the `validation` before them, the rest trains.

    Rows of one second are never torn apart: all go to the later part, so that a part can be
    larger than asked for. Raises ValueError if that leaves nothing to train on.
    """
    _check_fractions(validation, test)
    order = chronological_order(dataset, ties, seed)
    time = np.sort(dataset.time)

    def start(fraction: float) -> int | float:
        rows = round(len(time) * fraction)
        return time[-rows] if rows else np.inf

    test_from, validation_from = start(test), start(validation + test)
    at = dataset.time[order]
    if not (at < validation_from).any():
        raise ValueError("global_time leaves no training rows: too many rows share one time.")
    is_test = at >= test_from
    return _split("global_time", ties, order, (at >= validation_from) & ~is_test, is_test)


def random_per_user(
    dataset: Dataset,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    ties: str = "row",
    seed: int = 0,
) -> Split:
    """Random rows of each user: fractions of their count, rounded; one row at least trains."""
    _check_fractions(validation, test)
    order = chronological_order(dataset, ties, seed)
    count, _ = _within_user(dataset, order)
    num_test = np.minimum(np.floor(count * test + 0.5), count - 1)
    num_validation = np.minimum(np.floor(count * validation + 0.5), count - 1 - num_test)
    # a random rank within the user: the position after sorting by (user, random number)
    draw = np.random.default_rng(seed).random(len(order))
    rank = np.empty(len(order), dtype=np.int64)
    rank[np.lexsort((draw, dataset.user[order]))] = _within_user(dataset, order)[1]
    is_test = rank < num_test
    is_validation = ~is_test & (rank < num_test + num_validation)
    return _split("random_per_user", ties, order, is_validation, is_test)


def item_cold_start(
    dataset: Dataset,
    *,
    fraction: float = 0.2,
    validation: float = 0.0,
    ties: str = "row",
    seed: int = 0,
) -> Split:
    """All rows of a random `fraction` of the items (`cold_items`) are test: no one trains on them.

    validation: a further fraction of the items whose rows are validation.
    """
    _check_fractions(validation, fraction)
    order = chronological_order(dataset, ties, seed)
    items = np.random.default_rng(seed).permutation(dataset.num_items)
    num_test = round(dataset.num_items * fraction)
    part = np.zeros(dataset.num_items, dtype=np.int8)
    part[items[:num_test]] = 2
    part[items[num_test : num_test + round(dataset.num_items * validation)]] = 1
    of_row = part[dataset.item[order]]
    cold = np.sort(items[:num_test])
    return _split("item_cold_start", ties, order, of_row == 1, of_row == 2, cold)


SPLITS: dict[str, Callable[..., Split]] = {
    function.__name__: function
    for function in (leave_last_one_out, global_time, random_per_user, item_cold_start)
}


def make_split(dataset: Dataset, name: str, **options) -> Split:
    """The split called `name`, with the options of the function of that name."""
    if name not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {name!r}.")
    return SPLITS[name](dataset, **options)


def _split(name, ties, order, validation, test, cold=None) -> Split:
    parts = order[~validation & ~test], order[validation], order[test]
    return Split(name, ties, *parts) if cold is None else Split(name, ties, *parts, cold)


def _within_user(dataset: Dataset, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row in `order`: how many rows its user has, and which of them it is (from 0)."""
    counts = np.bincount(dataset.user, minlength=dataset.num_users)
    user = dataset.user[order]
    first = np.cumsum(counts) - counts
    return counts[user], np.arange(len(order)) - first[user]


def _check_fractions(validation: float, test: float) -> None:
    if not (0 <= validation and 0 <= test and validation + test < 1):
        raise ValueError(
            f"fractions must be from 0 on and below 1 together, not {validation} and {test}."
        )


def _hash(value: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea and Flood, 2014): 64 well-mixed bits, the same on every machine."""
    with np.errstate(over="ignore"):
        z = np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
