"""Interactions of users with items, as columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Dataset:
    """A set of ratings with what is known of the items and users.

    Users and items are numbered from 0 in ascending order of their raw ids, and an item is in the
    data set exactly if it has been rated. The n rows stand in the order of the file, which is what
    breaks ties in time (see `splits`).
    """

    name: str
    user: np.ndarray  # (n,) int64, index into user_ids
    item: np.ndarray  # (n,) int64, index into item_ids
    rating: np.ndarray  # (n,) float32, stars
    time: np.ndarray  # (n,) int64, seconds since 1970
    user_ids: np.ndarray  # (U,) int64, ascending
    item_ids: np.ndarray  # (I,) int64, ascending
    titles: list[str]  # (I,) "" where unknown
    years: np.ndarray  # (I,) int64, 0 where unknown
    genre_names: list[str]  # (G,)
    genres: np.ndarray  # (I, G) bool; a row without True has no (known) genre
    user_features: dict[str, np.ndarray] = field(default_factory=dict)  # (U,) int64, 0 ... size - 1
    user_feature_sizes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader of results has to know about this data

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_interactions(self) -> int:
        return len(self.user)
