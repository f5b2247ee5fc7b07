"""The published MovieLens sets: what they must hold, so that half of one is never taken for it.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.
Counts: the READMEs of the sets, and the files themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

from recsys.data.errors import DataError


@dataclass(frozen=True)
class Known:
    ratings: int
    users: int
    movies: int  # lines of the movie file; some of them may have no rating
    md5: str | None  # of the published zip file; None: ask for the file published beside it


KNOWN = {
    "ml-100k": Known(100_000, 943, 1_682, "0e33842e24a9c977be4e0107933c0723"),
    "ml-latest-small": Known(100_836, 610, 9_742, None),
    "ml-1m": Known(1_000_209, 6_040, 3_883, "c4d9eecfca2ab87c1945afe126590906"),
    "ml-25m": Known(25_000_095, 162_541, 62_423, "6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": Known(32_000_204, 200_948, 87_585, "d472be332d4daa821edc399621853b57"),
}

# The earliest rating of any of the sets is of 1995. A time that lost its last digit, as the last
# line of a file that was cut off has, falls before it.
EARLIEST = 788_918_400


def check_known(name: str, ratings: int, users: int, movies: int, first_time: int) -> None:
    """Raise `DataError` if the set called `name` is not whole. Other names are not checked."""
    known = KNOWN.get(name)
    if known is None:
        return
    for what, has, must in (
        ("ratings", ratings, known.ratings),
        ("users", users, known.users),
        ("movies", movies, known.movies),
    ):
        if has != must:
            raise DataError(
                f"{name} has {must:,} {what}, but {has:,} were found: the files are cut off or "
                "changed. Fetch the set again; if these are your own data, rename the folder."
            )
    if first_time < EARLIEST:
        raise DataError(
            f"{name} has no rating before 1995, but the time {first_time} was found: the rating "
            "file is cut off or changed. Fetch the set again."
        )
