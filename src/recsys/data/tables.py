"""Reading text tables: fast when they are right, precise when they are wrong.

The fast path is the C parser of pandas and checks on whole columns. Only when that has failed is
the file read again, line by line, to name the first line that is wrong.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recsys.data.errors import DataError

ID = r"\d{1,18}"  # what surely fits into 64 bits
COLUMNS = ("user id", "item id", "rating", "Unix time")
CSV_HEADER = ("userId", "movieId", "rating", "timestamp")
SEPARATORS = {"\t": "tabs", "::": "'::'", ",": "commas"}
SCALES = {  # scale of the ratings -> what one looks like
    "1 to 5": r"[1-5]",
    "0.5 to 5 in half stars": r"(?:0?\.5|[1-4](?:\.[05])?|5(?:\.0)?)0*",
}


def read_text(path: Path, encoding: str) -> str:
    """The file as text. With "latin-1", a file that has been converted to UTF-8 is read as that."""
    content = path.read_bytes()
    if encoding == "latin-1":  # accented Latin-1 is never valid UTF-8 by accident
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return content.decode("latin-1")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Expected a text file saved as UTF-8."
        ) from None


def read_lines(path: Path, pattern: str, expected: str, encoding: str = "latin-1") -> pd.DataFrame:
    """A small table with one line a row: the named groups of `pattern` as text columns.

    Blank lines are left out; any other line must match as a whole.
    """
    lines = pd.Series(read_text(path, encoding).split("\n"), dtype=object).str.rstrip("\r")
    lines = lines[lines.str.strip() != ""]
    if lines.empty:
        raise DataError(f"{path} is empty. Expected lines with {expected}.")
    table = lines.str.extract(rf"^{pattern}$")
    wrong = table.isna().any(axis=1)
    if wrong.any():
        row = wrong.idxmax()
        raise DataError(_message(path, row + 1, lines[row], expected))
    return table


def read_ratings(path: Path, separator: str, scale: str) -> list[np.ndarray]:
    """The four columns of a rating file: user, item, rating, time.

    separator: "\\t" or "::" (no header), or "," (with a header that names userId, movieId, rating
    and timestamp, in any order and among others). scale: a key of SCALES.
    Raises `DataError` that names the first line that is wrong.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Expected lines with {_expected(separator, scale)}.")
    try:
        columns = _fast(path, separator, np.int64 if scale == "1 to 5" else np.float64)
    except (ValueError, OverflowError):  # pandas' parser errors are ValueErrors
        columns = None
    if columns is not None and len(columns[0]) == 0:
        raise DataError(f"{path} holds no ratings, only a header.")
    if columns is None or not _in_range(columns, scale):
        raise _find_error(path, separator, scale)
    return columns


def _fast(path: Path, separator: str, rating_type: type) -> list[np.ndarray] | None:
    types = (np.int64, np.int64, rating_type, np.int64)
    if separator == ",":
        dtype = dict(zip(CSV_HEADER, types, strict=True))
        table = pd.read_csv(path, usecols=list(dtype), dtype=dtype, index_col=False)
        return [table[name].to_numpy() for name in CSV_HEADER]
    # "::" is a separator of two characters, for which pandas has no fast path: read it as two
    # separators of one, with an empty column between them.
    step = len(separator)
    table = pd.read_csv(
        path,
        sep=separator[0],
        header=None,
        dtype={step * column: kind for column, kind in enumerate(types)},
        quoting=csv.QUOTE_NONE,
        encoding="latin-1",
    )
    between = [column for column in table if column % step]
    if table.shape[1] != 3 * step + 1 or table[between].notna().to_numpy().any():
        return None
    return [table[step * column].to_numpy() for column in range(4)]


def _in_range(columns: list[np.ndarray], scale: str) -> bool:
    user, item, rating, time = columns
    if min(user.min(), item.min(), time.min()) < 0:
        return False
    if scale == "1 to 5":
        return bool(rating.min() >= 1 and rating.max() <= 5)
    return bool(rating.min() >= 0.5 and rating.max() <= 5 and (rating * 2 % 1 == 0).all())


def _find_error(path: Path, separator: str, scale: str) -> DataError:
    """The error for the first line that is wrong. Slow; a message is all that it is for."""
    patterns = [re.compile(pattern) for pattern in (ID, ID, SCALES[scale], ID)]
    expected = _expected(separator, scale)
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        positions: Sequence[int] = range(4)
        for number, line, fields in _fields(file, separator):
            if number == 1 and separator == ",":
                missing = [name for name in CSV_HEADER if name not in fields]
                if missing:
                    expected = f"a header with {', '.join(CSV_HEADER)} ({missing[0]} is missing)"
                    return DataError(_message(path, number, line, expected))
                positions, width = [fields.index(name) for name in CSV_HEADER], len(fields)
                continue
            right = len(fields) == (width if separator == "," else 4) and all(
                pattern.fullmatch(fields[at].strip())
                for pattern, at in zip(patterns, positions, strict=True)
            )
            if not right:
                return DataError(_message(path, number, line, expected))
    return DataError(f"{path} cannot be read. Expected lines with {expected}.")


def _fields(file: Iterable[str], separator: str) -> Iterator[tuple[int, str, list[str]]]:
    for number, line in enumerate(file, start=1):
        line = line.rstrip("\r\n")
        if line.strip():
            csv_line = separator == ","
            yield number, line, next(csv.reader([line])) if csv_line else line.split(separator)


def _expected(separator: str, scale: str) -> str:
    user, item, rating, time = COLUMNS
    return f"{user}, {item}, {rating} {scale} and {time}, separated by {SEPARATORS[separator]}"


def _message(path: Path, number: int, line: str, expected: str) -> str:
    shown = line if len(line) <= 80 else line[:77] + "..."
    shown = shown.replace("\\", "\\\\").replace("\t", "\\t")
    return f'{path}, line {number}: "{shown}" - expected {expected}.'
