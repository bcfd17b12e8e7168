"""Where bytes come from: a named range of a file, as plain data. Whoever reads it opens it; nothing here does."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple, Protocol


class Origin(NamedTuple):
    """A file and, where its bytes are compressed, what decodes them (see `coding.py`); offsets count decoded bytes.

    No path: the bytes come from no file, and `coding` says how they are made.
    """

    path: str
    coding: str = ""


class Source(NamedTuple):
    """A byte range of a file: a whole file, a safetensors body, a record of a zip, a member of a tar, a decoded chunk."""

    path: str
    offset: int
    nbytes: int
    coding: str = ""

    @property
    def origin(self) -> Origin:
        return Origin(self.path, self.coding)

    def inside(self, offset: int, nbytes: int) -> Source:
        """The range at `offset` of this one (the caller has checked that it lies within)."""
        return Source(self.path, self.offset + offset, nbytes, self.coding)


class Identity(NamedTuple):
    """What tells that a source file is still the one that was planned with."""

    size: int
    mtime_ns: int


class Opened(Protocol):
    """An open source: the seam behind which a file may become an object in a store."""

    def read_into(self, offset: int, buffers: list[memoryview]) -> int:
        """Fill the buffers from `offset`; return how many bytes came (fewer than asked is allowed, 0 is the end)."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """`Opened` for a path of this machine: preadv, no mapping, no buffering of its own."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY)
        with suppress(AttributeError, OSError):  # advice, to read far ahead: not every system takes it
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, buffers: list[memoryview]) -> int:
        return os.preadv(self.fd, buffers, offset)

    def close(self) -> None:
        os.close(self.fd)


def identity(path: str) -> Identity:
    stat = os.stat(path)
    return Identity(stat.st_size, stat.st_mtime_ns)


def whole(path: str) -> Source:
    """The range that is the whole file."""
    return Source(str(path), 0, os.stat(path).st_size)
