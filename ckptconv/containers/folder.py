"""The files of a folder: a listing, and which links are followed, the same for every format."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ckptconv.containers.ranges import locate
from ckptconv.errors import FormatError
from ckptconv.source import Source

XET = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})")


def listed(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda item: item.name)
    except OSError as error:
        raise FormatError(folder, f"cannot be listed: {error.strerror}") from None


def located(folder: Path, name: str) -> Source:
    """The bytes of a file at or below a folder; what it is, if it is a link, is for `inside` to say."""
    path = folder / name
    return locate(inside(folder, name) if path.is_symlink() else path)


def inside(folder: Path, name: str) -> Path:
    """A file of the folder. Its link may lead nowhere else, but for the blobs of the Hugging Face cache it lies in."""
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        link = f"is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "is not there"
        raise FormatError(path, link) from None
    if home not in real.parents and not _is_cached(home, real):
        to = os.readlink(path) if path.is_symlink() else real
        raise FormatError(path, f"is a link that leaves the folder, to {to}; put the file itself there")
    if not real.is_file():
        raise FormatError(path, "is not a regular file")
    return path


def _is_cached(home: Path, real: Path) -> bool:
    """snapshots/<revision>/… -> blobs/<hash> of that repository, or on to the cache's shared blobs/<2 hex>/<64 hex>."""
    snapshots = next((above for above in home.parents if above.name == "snapshots"), None)
    if snapshots is None:
        return False
    repository = snapshots.parent
    if real.parent == repository / "blobs":
        return True
    shared = repository.parent / "blobs"
    return shared in real.parents and XET.fullmatch(real.relative_to(shared).as_posix()) is not None
