"""Exact reads of header bytes inside a byte range; whatever goes wrong is a FormatError that names the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ckptconv.errors import FormatError
from ckptconv.source import LocalFile, Source

Place = str | Path | Source  # a file, or a byte range of one: a member of a tar, a record of a zip
WINDOW = 4096


def locate(place: Place) -> Source:
    """The byte range of a place, checked to be inside a regular file (opening a pipe would wait for ever)."""
    path = place.path if isinstance(place, Source) else str(place)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise FormatError(path, f"cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(path, "is not a regular file")
    if not isinstance(place, Source):
        return Source(path, 0, status.st_size)
    if place.offset < 0 or place.nbytes < 0 or place.offset + place.nbytes > status.st_size:
        raise FormatError(path, f"bytes {place.offset}+{place.nbytes} are not inside its {status.st_size} bytes")
    return place


class HeaderReader:
    """Reads of a few bytes here and there: a window is kept, as neighbouring headers tend to be asked for in turn."""

    def __init__(self, source: Source, where: str) -> None:
        self.source, self.where = source, where
        self._window, self._start = b"", 0
        try:
            self._file = LocalFile(source.path)
        except OSError as error:
            raise FormatError(where, f"cannot be opened: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, offset: int, nbytes: int, what: str) -> bytes:
        """Exactly these bytes; `what` they are goes into the message if they are not there."""
        at = offset - self._start
        if at < 0 or at + nbytes > len(self._window):
            size = self.source.nbytes
            if offset < 0 or offset + nbytes > size:
                raise FormatError(
                    self.where, f"{what} at {offset}+{nbytes} is not inside its {size} bytes (truncated?)"
                )
            self._window = self._fetch(offset, min(max(nbytes, WINDOW), size - offset))
            self._start, at = offset, 0
        return self._window[at : at + nbytes]

    def chunks(self, source: Source, nbytes: int) -> Iterator[memoryview]:
        """A byte range of the file piece by piece, in one reused buffer."""
        buffer = memoryview(bytearray(min(nbytes, source.nbytes)))
        at = 0
        while at < source.nbytes:
            piece = buffer[: min(nbytes, source.nbytes - at)]
            self._fill(source.offset + at, piece)
            yield piece
            at += len(piece)

    def _fetch(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self._fill(self.source.offset + offset, memoryview(buffer))
        return bytes(buffer)

    def _fill(self, position: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = self._file.read_into(position + done, [buffer[done:]])
            except OSError as error:
                raise FormatError(self.where, f"cannot be read at {position + done}: {error.strerror}") from None
            if got == 0:
                raise FormatError(self.where, f"ends at byte {position + done}; it shrank while it was read")
            done += got
