"""What is known of items and users, as tensors and the description of them that a tower needs."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.data.dataset import Dataset

ARTICLES = "The|A|An|Le|La|Les|L'|Un|Une|Il|El|Los|Las|Der|Die|Das"


@dataclass(frozen=True)
class Feature:
    """One input of a tower.

    kind, and the shape of a batch of it:
        "id"         (B,) int64, 0 is padding
        "multi_hot"  (B, L) int64, padded with 0 behind
        "history"    (B, L) int64, most recent first, padded with 0 behind
        "dense"      (B, size) float32
        "text"       (B, size) float32
    name: a plain word, as the column is called.
    size: rows of the embedding table (row 0 is the padding row), or the width of dense and text.
    table: features that name the same table share it; by default it is called as the feature is.
    """

    name: str
    kind: str
    size: int
    table: str | None = None


def item_features(dataset: Dataset) -> tuple[list[Feature], dict[str, Tensor]]:
    """Features of the items and their columns, one row an item.

    item_id: item index + 1, in the table "item"; genres: indices + 1; year: standardised, 0 where
    unknown. A feature that is unknown for all items is left out.
    """
    num_items = dataset.num_items
    features = [Feature("item_id", "id", num_items + 1, table="item")]
    columns = {"item_id": torch.arange(1, num_items + 1)}
    if dataset.genres.any():
        features.append(Feature("genres", "multi_hot", len(dataset.genre_names) + 1))
        columns["genres"] = torch.from_numpy(_padded(dataset.genres))
    known = dataset.years > 0
    if known.any():
        features.append(Feature("year", "dense", 1))
        columns["year"] = torch.from_numpy(_standardised(dataset.years, known))[:, None]
    return features, columns


def user_features(dataset: Dataset) -> tuple[list[Feature], dict[str, Tensor]]:
    """Features of the users and their columns, one row a user: category codes + 1.

    No user id: features and history tell users apart, so one unseen in training can be served.
    """
    features = [
        Feature(name, "id", dataset.user_feature_sizes[name] + 1) for name in dataset.user_features
    ]
    columns = {name: torch.from_numpy(code + 1) for name, code in dataset.user_features.items()}
    return features, columns


def history_feature(dataset: Dataset) -> Feature:
    """The recent items of a user, in the table of the items; its values come from `Sequences`."""
    return Feature("history", "history", dataset.num_items + 1, table="item")


def item_texts(dataset: Dataset) -> list[str]:
    """A sentence an item for a text encoder: "The American President (1995). Comedy, Drama." """
    names = np.array(dataset.genre_names, dtype=object)
    return [
        " ".join(f"{part}." for part in (_natural(title), ", ".join(names[genres])) if part)
        for title, genres in zip(dataset.titles, dataset.genres, strict=True)
    ]


def content_vectors(dataset: Dataset, text: np.ndarray | None) -> np.ndarray:
    """(I, W) what items are apart from ratings: text vectors, if any, genres and the decade."""
    genres = dataset.genres / np.sqrt(dataset.genres.sum(1, keepdims=True).clip(1))
    decade = np.where(dataset.years > 0, (dataset.years - 1990) / 20, 0.0)[:, None]
    parts = [genres - genres.mean(0), decade]
    return np.concatenate(parts if text is None else [text, *parts], axis=1)


def _natural(title: str) -> str:
    """The title in its natural order; MovieLens files "American President, The (1995)"."""
    return re.sub(rf"^(.*), ({ARTICLES})(?=$| \()", r"\2 \1", title) or "Unknown title"


def _padded(multi_hot: np.ndarray) -> np.ndarray:
    """(n, G) bool -> (n, L) int64: the indices + 1 of the True ones in front, 0 behind."""
    row, column = np.nonzero(multi_hot)
    count = multi_hot.sum(axis=1)
    padded = np.zeros((len(multi_hot), count.max()), dtype=np.int64)
    padded[row, np.arange(len(row)) - (np.cumsum(count) - count)[row]] = column + 1
    return padded


def _standardised(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 over the known values, 0 for the others, float32."""
    mean, deviation = values[known].mean(), values[known].std()
    scaled = (values - mean) / (deviation if deviation > 0 else 1.0)
    return np.where(known, scaled, 0.0).astype(np.float32)
