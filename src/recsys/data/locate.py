"""Where data sets are: KATA_DATA, the cache, and what is unpacked or downloaded into it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from recsys.data.download import download
from recsys.data.errors import DataError
from recsys.data.known import KNOWN
from recsys.data.unpack import unpack

BASE_URL = "https://files.grouplens.org/datasets/movielens/"


def cache_folder() -> Path:
    """KATA_CACHE, else the folder for caches of this platform."""
    if os.environ.get("KATA_CACHE"):
        return Path(os.environ["KATA_CACHE"]).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "recsys-katas"


def find_known(name: str, progress: Callable | None = None) -> Path:
    """The folder of a published set.

    In this order: $KATA_DATA/name, $KATA_DATA if it is called so itself, $KATA_DATA/name.zip, the
    cache, and at last a download into the cache.
    """
    cache = cache_folder()
    if os.environ.get("KATA_DATA"):
        own = Path(os.environ["KATA_DATA"]).expanduser()
        if (own / name).is_dir():
            return own / name
        if own.is_dir() and own.resolve().name == name:
            return own
        if (own / f"{name}.zip").is_file():
            return unpacked_copy(own / f"{name}.zip")
    if (cache / name).is_dir():
        return cache / name
    return _download_known(name, cache, progress)


def _download_known(name: str, cache: Path, progress: Callable | None) -> Path:
    url, archive = f"{BASE_URL}{name}.zip", cache / f"{name}.zip"
    try:
        if not archive.exists():  # else it was fetched and checked, and unpacking was interrupted
            md5 = KNOWN[name].md5 or _published_md5(f"{url}.md5", cache / f"{name}.zip.md5")
            download(url, archive, md5=md5, progress=progress)
    except DataError as error:
        raise DataError(
            f"{error} Or fetch {name} by other means, unpack it, and set KATA_DATA to the folder "
            f"that holds {name}; synthetic data need no download."
        ) from None
    return unpack(archive, cache / name, remove=True)


def _published_md5(url: str, target: Path) -> str:
    """The checksum that is published beside the file, as `md5sum` or `md5` print it."""
    text = download(url, target).read_text(encoding="ascii", errors="replace")
    target.unlink()  # small, and may change with the file
    sums = [word.lower() for word in text.split() if len(word) == 32 and word.isalnum()]
    if len(sums) != 1:
        raise DataError(f"{url} holds no MD5 checksum.")
    return sums[0]


def unpacked_copy(archive: Path) -> Path:
    """The folder of an archive's content in the cache, unpacked on first use."""
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return unpack(archive, cache_folder() / "unpacked" / digest.hexdigest()[:16] / archive.stem)
