"""Fetching a file over HTTP: resumed where it broke off, checked, and in place only when whole."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from recsys.data.errors import DataError

TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 18


def download(
    url: str,
    target: Path,
    *,
    md5: str | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Path:
    """Fetch `url` into the file `target`, and return it.

    What arrives is kept in `target` + ".part" until it is whole, so that a later call goes on
    where this one broke off. progress: called with (file name, bytes so far, bytes in all or None).
    Raises `DataError` on no network, a refused request, a broken connection, a full disk, or
    content that has not the checksum `md5`.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = _fetch(url, part, progress)
        if md5 is not None and _md5(part) != md5:
            part.unlink()  # resuming it would never end well
            if not resumed:
                raise DataError(f"{url} does not have its published checksum (MD5 {md5}).")
            # the part may have been of an older version of the file
            return download(url, target, md5=md5, progress=progress)
        os.replace(part, target)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url} cannot be had: HTTP {error.code} {error.reason}.") from None
    except urllib.error.URLError as error:
        raise DataError(f"{url} cannot be reached: {error.reason}.") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise DataError(_broken(url, part, repr(error))) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"The disk is full: {target} does not fit.") from None
        raise DataError(f"{target} cannot be written: {error.strerror}.") from None
    return target


def _fetch(url: str, part: Path, progress: Callable | None) -> bool:
    """Append what is missing to `part`; whether it went on from an earlier call."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "recsys-katas"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies behind what we have
            whole = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if whole and int(whole[1]) == have:
                return True
            part.unlink()
            return _fetch(url, part, progress)
        raise
    with response:
        begin = re.match(rf"bytes {have}-", response.headers.get("Content-Range", ""))
        resumed = bool(have and response.status == 206 and begin)
        if response.status == 206 and not resumed:
            part.unlink()
            return _fetch(url, part, progress)
        if not resumed:
            have = 0  # the server sends the file from its beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        _check_space(part, total, have)
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(part.stem, have, total)
    if total is not None and have < total:
        raise DataError(_broken(url, part, f"{have:,} of {total:,} bytes arrived"))
    return resumed


def _check_space(part: Path, total: int | None, have: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise DataError(
            f"The disk is full: {total - have:,} bytes are to come, {free:,} are free in "
            f"{part.parent}."
        )


def _broken(url: str, part: Path, what: str) -> str:
    return f"{url}: the connection broke ({what}). Run again to go on from {part}."


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
