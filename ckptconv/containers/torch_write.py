"""Laying out a torch file (.pt): the zip torch.save writes, pickle and headers ready, tensors still to be read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Mapping
from pathlib import PurePath

from ckptconv.containers.pickler import Pickler
from ckptconv.containers.zipdir import CENTRAL, CENTRAL_CRC, END, END64, LOCAL, LOCAL_CRC, LOCATOR, MAX16, MAX32, UTF8
from ckptconv.plan import File, Late, Segment
from ckptconv.tensor import Tensor

ALIGNMENT = 64  # of every record, so that torch can map them; what torch itself uses
DATE = 0x21  # 1 January 1980: the same input gives the same bytes
FIXED = ((".format_version", b"1"), (".storage_alignment", b"%d" % ALIGNMENT), ("byteorder", b"little"))
VERSION = ("version", b"3\n")
_PADDING = [struct.pack("<2sH", b"FB", n) + b"Z" * n for n in range(ALIGNMENT)]


def layout(path: str, obj: object, *, names: Mapping[str, str] | None = None, allowed: Collection[str] = ()) -> File:
    """The file torch.save would write for `obj`; one tensor met twice is stored once.

    Segments are called by the path of their tensor in the object ("model/decoder.x"), or what `names` has for it.
    An inert object is written back if it is known to be harmless, or named ("module.name") in `allowed`.
    """
    pickler = Pickler(path, allowed)
    data = pickler.dump(obj)
    archive = _Layout(PurePath(path).stem or "archive")
    archive.known("data.pkl", data)
    for name, content in FIXED:
        archive.known(name, content)
    for key, body in enumerate(pickler.bodies):
        archive.tensor(f"data/{key}", body.tensor, (names or {}).get(body.path, body.path))
    archive.known(*VERSION)
    return archive.file(path)


class _Layout:
    """Records one after another: plain bytes are gathered until a tensor comes between, whose CRC is not known."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.segments: list[Segment] = []
        self.pending: list[bytes] = []
        self.at = self.start = 0  # of the next byte, and of the pending ones
        self.directory: list[bytes] = []
        self.directory_at = 0
        self.crcs: list[tuple[int, int]] = []

    def known(self, name: str, content: bytes) -> None:
        """A record whose bytes are there."""
        header = self._header(name, len(content), zlib.crc32(content))
        self.pending += (header, content)
        self.at += len(header) + len(content)

    def tensor(self, name: str, body: Tensor, title: str) -> None:
        """A record that is a tensor: its CRC32, in both of its headers, comes late. An empty one's is 0."""
        nbytes = body.nbytes
        if not nbytes:
            header = self._header(name, 0, 0)
            self.pending.append(header)
            self.at += len(header)
            self._flush()
        else:
            self._flush()
            index = len(self.segments) + 1
            self.crcs.append((self.directory_at + CENTRAL_CRC, index))
            header = self._header(name, nbytes, 0)
            self.segments.append(Segment(self.at, Late(header, ((LOCAL_CRC, index),))))
            self.at += len(header)
        self.segments.append(Segment(self.at, body, title))
        self.at = self.start = self.at + nbytes

    def file(self, path: str) -> File:
        self._flush()
        count, nbytes = len(self.directory), self.directory_at
        ends = END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, count, count, nbytes, self.at)
        ends += LOCATOR.pack(b"PK\6\7", 0, self.at + nbytes, 1)
        short = min(count, MAX16)
        ends += END.pack(b"PK\5\6", 0, 0, short, short, min(nbytes, MAX32), min(self.at, MAX32), 0)
        template = b"".join([*self.directory, ends])
        self.segments.append(Segment(self.at, Late(template, tuple(self.crcs)) if self.crcs else template))
        return File(path, self.at + len(template), tuple(self.segments))

    def _flush(self) -> None:
        if self.pending:
            self.segments.append(Segment(self.start, b"".join(self.pending)))
            self.pending = []
        self.start = self.at

    def _header(self, name: str, size: int, crc: int) -> bytes:
        """The local header, padded so that the data is aligned; the row of the directory is noted on the way."""
        raw = f"{self.root}/{name}".encode()
        wide, far = size >= MAX32, self.at >= MAX32
        extra = struct.pack("<2H2Q", 1, 16, size, size) if wide else b""
        pad = -(self.at + LOCAL.size + len(raw) + len(extra) + 4) % ALIGNMENT
        extra += _PADDING[pad]
        short, version = min(size, MAX32), 45 if wide or far else 20
        local = LOCAL.pack(b"PK\3\4", version, UTF8, 0, 0, DATE, crc, short, short, len(raw), len(extra))
        long = ((size, size) if wide else ()) + ((self.at,) if far else ())
        field = struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *long) if long else b""
        offset = min(self.at, MAX32)
        row = (
            b"PK\1\2",
            version,
            version,
            UTF8,
            0,
            0,
            DATE,
            crc,
            short,
            short,
            len(raw),
            len(field),
            0,
            0,
            0,
            0,
            offset,
        )
        entry = CENTRAL.pack(*row) + raw + field
        self.directory.append(entry)
        self.directory_at += len(entry)
        return local + raw + extra
