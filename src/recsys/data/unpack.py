"""Unpacking an archive that is not trusted."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from recsys.data.errors import DataError

LIMIT = 4 << 30  # bytes unpacked; the largest of the known sets has a good third of that
MAX_FILES = 1_000


def unpack(archive: Path, folder: Path, *, limit: int = LIMIT, remove: bool = False) -> Path:
    """Unpack a zip file so that `folder` holds its files, and return `folder`.

    A single folder at the archive's root is left out. An existing `folder` is taken as it is:
    files go to a temporary folder beside it, which gets its name when it is complete.
    remove: delete the archive once it is unpacked, or has turned out to be damaged.
    Raises `DataError` if the archive is damaged, would write outside the folder, holds links, or
    unpacks to more than `limit` bytes.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    damaged = False
    try:
        with zipfile.ZipFile(archive) as file:
            members = _checked(file, archive, limit)
            for member in members:
                _write(file, member, work / member.filename)
        inside = list(work.iterdir())
        root = inside[0] if len(inside) == 1 and inside[0].is_dir() else work
        try:
            os.replace(root, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
        return folder
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{archive} could not be unpacked to {folder}: {error.strerror}."
            ) from None
        damaged = True  # BadZipFile, and what each way of compressing raises of its own
        raise DataError(f"{archive} is not a whole zip file: {error}.") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if remove and (damaged or folder.is_dir()):
            archive.unlink()


def _checked(file: zipfile.ZipFile, archive: Path, limit: int) -> list[zipfile.ZipInfo]:
    """The files in the archive, once every one of them has been found harmless."""
    members = [member for member in file.infolist() if not member.is_dir()]
    if len(members) > MAX_FILES:
        raise DataError(f"{archive} holds {len(members)} files; at most {MAX_FILES} are unpacked.")
    if sum(member.file_size for member in members) > limit:
        raise DataError(f"{archive} would unpack to more than {limit / 1e6:,.0f} MB: refused.")
    for member in members:
        name = member.filename
        path = PurePosixPath(name)
        kind = stat.S_IFMT(member.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise DataError(f"{archive} holds {name!r}, a path outside its folder: refused.")
        if kind not in (0, stat.S_IFREG):
            raise DataError(f"{archive} holds {name!r}, which is a link or device: refused.")
    return members


def _write(file: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    # zipfile reads no more than the declared size, which `_checked` has summed up
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open(member) as source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
