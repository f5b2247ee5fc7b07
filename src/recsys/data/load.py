"""`load`: the one way to a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recsys.data.dataset import Dataset
from recsys.data.errors import DataError
from recsys.data.known import KNOWN


def load(
    source: str | Path,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Dataset:
    """Load a data set.

    source: "synthetic" (generated from `seed`), the name of a published set ("ml-100k",
        "ml-latest-small", "ml-1m", "ml-25m", "ml-32m": taken from the folder in the environment
        variable KATA_DATA, else from the cache, else downloaded), or a path to a folder or zip
        file in one of their formats. A folder that is named like a published set must be that set.
    progress: called with (what, bytes done, bytes in all or None) during a download.

    Raises `DataError` if there is no such data, or it is malformed or not whole.
    """
    if source == "synthetic":
        from recsys.data.synthetic import generate

        return generate(seed=seed)

    # pandas is imported only where files are read: it costs as much as generating does
    from recsys.data.locate import find_known, unpacked_copy
    from recsys.data.movielens import read_folder

    path = Path(source).expanduser()
    try:
        if isinstance(source, str) and source in KNOWN:
            return read_folder(find_known(source, progress), source)
        if path.is_dir():
            return read_folder(path)
        if path.suffix.lower() == ".zip" and path.is_file():
            return read_folder(unpacked_copy(path))
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    if path.is_file():
        raise DataError(f"{path} is a file. Expected the folder that holds it, or a zip file.")
    raise DataError(
        f"There is no data set {str(source)!r}. Expected synthetic, {', '.join(KNOWN)}, or a path "
        "to a folder or zip file."
    )
