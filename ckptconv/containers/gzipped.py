"""A gzip'ed file made plain once, so that it can be read by byte range: the only copy that reading ever makes."""

from __future__ import annotations

import fcntl
import glob
import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import xxhash

from ckptconv.containers.ranges import HeaderReader, locate
from ckptconv.errors import FormatError, PlanError
from ckptconv.source import identity

MAGIC = b"\x1f\x8b\x08"
LIMIT = 1 << 42  # 4 TiB: more than any model
CHUNK = 1 << 20


def is_gzip(path: Path) -> bool:
    """Whether it begins as gzip files do."""
    source = locate(path)
    if source.nbytes < len(MAGIC):
        return False
    with HeaderReader(source, source.path) as reader:
        return reader.read(0, len(MAGIC), "the first bytes") == MAGIC


def scratch_file(path: Path, scratch: Path) -> Path:
    """Where in the folder `scratch` the plain bytes of a file lie, or will: named after the file as it is now."""
    size, mtime = identity(str(path))
    token = xxhash.xxh3_64_hexdigest(f"{os.path.realpath(path)}\n{size}\n{mtime}".encode())
    return scratch / f"{path.name}.{token}"


def unpacked(path: Path, scratch: Path, limit: int = LIMIT) -> Path:
    """The plain bytes of a gzip'ed file, in a file in the folder `scratch`, written in bounded memory.

    What an earlier call left there is taken as it is, so that stopped work can go on: the file appears only once it is
    whole, and has the time of the one it came from. More than `limit` bytes are refused: the caller knows the disk.
    """
    if not is_gzip(path):
        raise FormatError(path, "is not a gzip file, or its first bytes are damaged")
    final = scratch_file(path, scratch)
    if final.exists():
        return final
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final)
        with tempfile.NamedTemporaryFile(prefix=f"{final.name}.", suffix=".part", dir=scratch, delete=False) as out:
            part = Path(out.name)
            try:
                fcntl.flock(out, fcntl.LOCK_EX)  # says that this process lives
                _fill(path, out, limit)
                _keep_time(path, part)
                if scratch_file(path, scratch) != final:
                    raise FormatError(path, "changed while it was unpacked")
                part.replace(final)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise PlanError(f"{scratch}: cannot hold what {path} unpacks to: {error.strerror}") from None
    return final


def _remove_leftovers(final: Path) -> None:
    """What killed processes did not finish; a file that is being written is locked."""
    for part in final.parent.glob(f"{glob.escape(final.name)}.*.part"):
        with part.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            part.unlink(missing_ok=True)


def _fill(path: Path, out: IO[bytes], limit: int) -> None:
    done = 0
    for piece in _plain(path):
        done += len(piece)
        if done > limit:
            raise FormatError(path, f"unpacks to more than the {limit:,} bytes that there is room for")
        out.write(piece)
    out.flush()
    os.fsync(out.fileno())


def _keep_time(path: Path, part: Path) -> None:
    """Unpacked once more it is still the same source, to a plan that is continued."""
    times = path.stat()
    os.utime(part, ns=(times.st_atime_ns, times.st_mtime_ns))


def _plain(path: Path) -> Iterator[bytes]:
    """The plain bytes, piece by piece, held against the checksum and the length that stand at the end."""
    try:
        with gzip.open(path) as plain:
            while piece := plain.read(CHUNK):
                yield piece
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(path, f"does not unpack, it is truncated or damaged: {error}") from None
