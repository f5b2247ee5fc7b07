"""The three formats in which MovieLens sets have been published.

Which one a folder holds is told by its files, so a learner's own `ratings.csv` and `movies.csv`
are read like `ml-latest-small`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recsys.data.assemble import Movies, Ratings, Users, assemble
from recsys.data.dataset import Dataset
from recsys.data.errors import DataError
from recsys.data.known import check_known
from recsys.data.tables import ID, read_lines, read_movies, read_ratings

FORMATS = {  # format -> files, alternatives in the order of preference
    "100k": (("u.data",), ("u.item",), ("u.genre",), ("u.user",)),
    "1m": (("ratings.dat", "ratings.reconstructed.dat"), ("movies.dat",), ("users.dat",)),
    "csv": (("ratings.csv",), ("movies.csv",)),
}
AGES = np.array([18, 25, 35, 45, 50, 56])  # where a new age group begins, as in ml-1m
# the last year in brackets; of a series its first
YEAR = r".*\(([0-9]{4})(?:[-\u2013][0-9]{0,4})?\)"
MAX_GENRES = 1_000  # the table of films by genres is held in memory
NO_GENRE = ("", "(no genres listed)", "unknown")
RECONSTRUCTION = (
    "the ratings are a reconstruction: 13.4 % of the times are estimated, the order within each "
    "user is kept; do not use them where exact times matter"
)


def read_folder(folder: Path, name: str | None = None) -> Dataset:
    """Read the set in `folder`; `name` (default: the folder's) decides which counts it must have.

    Raises `DataError` if files are missing, malformed, or fewer rows than a known set has.
    """
    name = name or folder.resolve().name
    files, read = _files(folder)
    ratings, movies, users = read(*files)
    notes = (RECONSTRUCTION,) if files[0].name == "ratings.reconstructed.dat" else ()
    dataset = assemble(name, ratings, movies, users, notes)
    first = int(dataset.time.min())
    check_known(name, dataset.num_interactions, dataset.num_users, len(movies.ids), first)
    return dataset


def _files(folder: Path) -> tuple[list[Path], Callable[..., Any]]:
    """The files of the format that the folder holds, and its reader."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")
    best: list[str] | None = None
    for kind, parts in FORMATS.items():
        there = [next((name for name in part if (folder / name).is_file()), None) for part in parts]
        if all(there):
            return [folder / str(name) for name in there], READERS[kind]
        if there[0]:  # ratings without what belongs to them
            best = [" or ".join(p) for p, found in zip(parts, there, strict=True) if not found]
    if best:
        raise DataError(f"{folder} has a rating file but lacks {', '.join(best)}.")
    looked = "; ".join(", ".join(" or ".join(part) for part in parts) for parts in FORMATS.values())
    raise DataError(f"{folder} holds no data set. Looked for one of these sets of files: {looked}.")


def _read_100k(data: Path, item: Path, genre: Path, user: Path) -> tuple[Ratings, Movies, Users]:
    ratings = Ratings(data.name, *read_ratings(data, "\t", "1 to 5"))
    genres = read_lines(genre, r"(?P<name>[^|]+)\|(?P<code>[0-9]{1,4})", "genre|number")
    names = genres["name"].to_list()
    if genres["code"].astype(int).to_list() != list(range(len(names))):
        raise DataError(f"{genre}: expected the genres numbered from 0, one after the other.")
    table = read_lines(
        item,
        rf"(?P<id>{ID})\|(?P<title>[^|]*)\|(?P<date>[^|]*)\|[^|]*\|[^|]*"
        rf"(?P<flags>(?:\|[01]){{{len(names)}}})",
        f"id|title|release date|video release date|URL and {len(names)} flags 0 or 1, one a genre",
    )
    flags = np.frombuffer("".join(table["flags"]).encode(), dtype=np.uint8)
    multi_hot = flags.reshape(len(table), len(names), 2)[:, :, 1] == ord("1")
    kept = [index for index, name in enumerate(names) if name not in NO_GENRE]
    years = _years(table["title"], table["date"].str.extract(r"([0-9]{4})$")[0])
    movies = Movies(
        item.name,
        table["id"].to_numpy(np.int64),
        _titles(table["title"]),
        years,
        [names[index] for index in kept],
        multi_hot[:, kept],
    )
    people = read_lines(
        user,
        rf"(?P<id>{ID})\|(?P<age>[0-9]{{1,3}})\|(?P<gender>[MF])\|(?P<job>[^|]+)\|(?P<zip>[^|]+)",
        "user id|age|M or F|occupation|zip code",
    )
    return ratings, movies, _users(user.name, people)


def _read_1m(data: Path, movie: Path, user: Path) -> tuple[Ratings, Movies, Users]:
    ratings = Ratings(data.name, *read_ratings(data, "::", "1 to 5"))
    table = read_lines(
        movie, rf"(?P<id>{ID})::(?P<title>.*)::(?P<genres>.*)", "id::title::genre|genre|..."
    )
    people = read_lines(
        user,
        rf"(?P<id>{ID})::(?P<gender>[MF])::(?P<age>[0-9]{{1,3}})::(?P<job>[0-9]+)::(?P<zip>.+)",
        "user id::M or F::age::number of occupation::zip code",
    )
    people["job"] = people["job"].str.zfill(2)  # so that sorting as text is sorting as numbers
    return ratings, _movies(movie.name, table), _users(user.name, people)


def _read_csv(data: Path, movie: Path) -> tuple[Ratings, Movies, None]:
    ratings = Ratings(data.name, *read_ratings(data, ",", "0.5 to 5 in half stars"))
    return ratings, _movies(movie.name, read_movies(movie)), None


READERS: dict[str, Callable[..., Any]] = {"100k": _read_100k, "1m": _read_1m, "csv": _read_csv}


def _movies(file: str, table: pd.DataFrame) -> Movies:
    """Movies whose genres are names separated by |."""
    names = table["genres"].str.split("|").explode().str.strip()
    names = names[~names.isin(NO_GENRE)]
    codes, genre_names = pd.factorize(names, sort=True)
    if len(genre_names) > MAX_GENRES:
        raise DataError(
            f"{file} has {len(genre_names):,} genres; expected at most {MAX_GENRES:,}, "
            "separated by |."
        )
    rows = table.index.get_indexer(names.index)
    genres = np.zeros((len(table), len(genre_names)), dtype=bool)
    genres[rows, codes] = True
    years = _years(table["title"])
    ids = table["id"].to_numpy(np.int64)
    return Movies(file, ids, _titles(table["title"]), years, list(genre_names), genres)


def _titles(titles: pd.Series) -> np.ndarray:
    return np.array(titles.str.strip().to_list(), dtype=object)


def _years(titles: pd.Series, fallback: pd.Series | None = None) -> np.ndarray:
    """The year of a film from its title, "Heat (1995)", else from `fallback`; 0 if unknown."""
    years = titles.str.extract(YEAR, flags=re.DOTALL)[0]
    if fallback is not None:
        years = years.fillna(fallback)
    years = years.fillna("0").astype(np.int64).to_numpy()
    return np.where((years >= 1870) & (years <= 2100), years, 0)


def _users(file: str, table: pd.DataFrame) -> Users:
    """Categories: age group (those of ml-1m), gender, occupation, first digit of the zip code."""
    jobs, job_names = pd.factorize(table["job"], sort=True)
    features = {
        "age": np.searchsorted(AGES, table["age"].to_numpy(np.int64), side="right"),
        "gender": (table["gender"] == "M").to_numpy(),
        "occupation": jobs,
        "zip": table["zip"].str.extract(r"^([0-9])")[0].fillna("10").to_numpy(np.int64),
    }
    sizes = {"age": len(AGES) + 1, "gender": 2, "occupation": len(job_names), "zip": 11}
    features = {key: codes.astype(np.int64) for key, codes in features.items()}
    return Users(file, table["id"].to_numpy(np.int64), features, sizes)
