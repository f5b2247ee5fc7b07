"""Reading text tables: fast when they are right, precise when they are wrong.

The fast path is the C parser of pandas and checks on whole columns. Only when that has failed is
the file read again, line by line, to name the first line that is wrong.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from recsys.data.errors import DataError

ID = r"[0-9]{1,18}"  # what surely fits into 64 bits; \d would take the digits of all scripts
COLUMNS = ("user id", "item id", "rating", "Unix time")
CSV_HEADER = ("userId", "movieId", "rating", "timestamp")
MOVIES_HEADER = ("movieId", "title", "genres")
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


def read_movies(path: Path) -> pd.DataFrame:
    """A CSV file with a header that names movieId, title and genres, as text columns (id, ...)."""
    text = read_text(path, "utf-8-sig")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows, begin = [], 1  # the line on which a row begins: a title in quotes may hold line ends
    try:
        for fields in lines:
            if any(field.strip() for field in fields):
                if not header:
                    header = fields
                    _check_movies_header(path, begin, header)
                elif len(fields) != len(header):
                    expected = f"{len(header)} fields, as in the header, not {len(fields)}"
                    raise DataError(_message(path, begin, ",".join(fields), expected))
                elif not re.fullmatch(ID, fields[header.index("movieId")]):
                    expected = "a movieId that is a whole number from 0 on"
                    raise DataError(_message(path, begin, ",".join(fields), expected))
                else:
                    rows.append([fields[header.index(name)] for name in MOVIES_HEADER])
            begin = lines.line_num + 1
    except csv.Error as error:
        line = text.split("\n")[begin - 1] if begin <= text.count("\n") + 1 else ""
        expected = f"fields separated by commas ({error})"
        raise DataError(_message(path, begin, line, expected)) from None
    if not rows:
        raise DataError(f"{path} holds no films{', only a header' if header else ''}. Expected "
                        f"lines with {', '.join(MOVIES_HEADER)}.")  # fmt: skip
    return pd.DataFrame(rows, columns=["id", *MOVIES_HEADER[1:]], dtype=object)


def _check_movies_header(path: Path, number: int, header: list[str]) -> None:
    missing = [name for name in MOVIES_HEADER if name not in header]
    if missing:
        expected = f"a header with {', '.join(MOVIES_HEADER)} ({missing[0]} is missing)"
        raise DataError(_message(path, number, ",".join(header), expected))


def read_ratings(path: Path, separator: str, scale: str) -> list[np.ndarray]:
    """The four columns of a rating file: user, item, rating, time.

    separator: "\\t" or "::" (no header), or "," (with a header that names userId, movieId, rating
    and timestamp, in any order and among others). scale: a key of SCALES.
    Raises `DataError` that names the first line that is wrong.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty. Expected lines with {_expected(separator, scale)}.")
    try:
        columns = _fast(path, separator)
    except (ValueError, OverflowError):  # pandas' parser errors are ValueErrors
        columns = None
    if columns is not None and len(columns[0]) == 0:
        raise DataError(f"{path} holds no ratings, only a header.")
    if columns is None or not _right(columns, scale):
        raise _find_error(path, separator, scale)
    return columns


def _fast(path: Path, separator: str) -> list[np.ndarray] | None:
    """The columns as the C parser takes them, or None if there are not just those."""
    if separator == ",":  # without usecols, which silently drops surplus fields
        table, names = pd.read_csv(path, low_memory=False), list(CSV_HEADER)
        if not isinstance(table.index, pd.RangeIndex) or not set(names) <= set(table.columns):
            return None  # the first line has more fields than the header, or a name is missing
        return [table[name].to_numpy() for name in names]
    # "::" is a separator of two characters, for which pandas has no fast path: read it as two
    # separators of one, with an empty column between them.
    step, quoting = len(separator), csv.QUOTE_NONE
    table = pd.read_csv(path, sep=separator[0], header=None, quoting=quoting, low_memory=False)
    between = [column for column in table if column % step]
    if table.shape[1] != 3 * step + 1 or table[between].notna().to_numpy().any():
        return None
    return [table[step * column].to_numpy() for column in range(4)]


def _right(columns: list[np.ndarray], scale: str) -> bool:
    user, item, rating, time = columns
    # The parser's own types tell: 9.65e+08, as spreadsheets write it, a gap or text is no integer.
    whole = [column.dtype == np.int64 for column in columns]
    if not (whole[0] and whole[1] and whole[3] and (whole[2] or scale != "1 to 5")):
        return False
    if rating.dtype.kind not in "if":
        return False
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
        lines = _fields(file, separator)
        positions: Sequence[int] = range(4)
        width = 4
        if separator == ",":
            number, line, header = next(lines, (1, "", []))
            missing = [name for name in CSV_HEADER if name not in header]
            if missing:
                expected = f"a header with {', '.join(CSV_HEADER)} ({missing[0]} is missing)"
                return DataError(_message(path, number, line, expected))
            positions, width = [header.index(name) for name in CSV_HEADER], len(header)
        for number, line, fields in lines:
            right = len(fields) == width and all(
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
            yield number, line, _split_csv(line) if separator == "," else line.split(separator)


def _split_csv(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error:  # an open quote
        return []


def _expected(separator: str, scale: str) -> str:
    user, item, rating, time = COLUMNS
    return f"{user}, {item}, {rating} {scale} and {time}, separated by {SEPARATORS[separator]}"


def _message(path: Path, number: int, line: str, expected: str) -> str:
    return f'{path}, line {number}: "{_shown(line)}" - expected {expected}.'


def _shown(text: str) -> str:
    """As it can go to a terminal: short, and nothing in it that a terminal would obey."""
    text = text if len(text) <= 80 else text[:77] + "..."
    text = text.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
