"""The directory of a zip file of stored records, checked against every local header; nothing is unpacked.

zipfile is not used: it trusts the central directory, says nothing of overlaps, and hides where a record lies.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from ckptconv.containers.ranges import HeaderReader
from ckptconv.errors import FormatError
from ckptconv.source import Source

LOCAL, CENTRAL, END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
END64, LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
DESCRIPTOR, DESCRIPTOR64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")
LOCAL_CRC, CENTRAL_CRC, DESCRIPTOR_CRC = 14, 16, 4  # where the CRC32 stands in each
STORED, DEFLATED = 0, 8
MAX16, MAX32 = 0xFFFF, 0xFFFFFFFF
HAS_DESCRIPTOR, UTF8 = 0x0008, 0x0800
_NOT_PLAIN = re.compile(r"//|/\.{1,2}/")
ENCRYPTED = 0x2041  # traditional, strong, and masked headers
MAX_DIRECTORY = 1 << 28
CHUNK = 1 << 20


class Record(NamedTuple):
    """A stored member: its name, the byte range of its data, the CRC32 the directory gives for it, and where that stands."""

    name: str
    source: Source
    crc: int
    crc_at: tuple[
        int, ...
    ]  # offsets in the archive: in the local header or the descriptor or both, and in the directory


class _Entry(NamedTuple):
    """A row of the central directory. `held` bytes are in the archive; they are `size` long when unpacked."""

    raw: bytes
    name: str
    flags: int
    method: int
    crc: int
    held: int
    size: int
    header: int
    row: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of a zip file. `checksums` is false where the writer left every CRC32 at 0 (torch can be told to).

    `packed` names the members that are compressed: they are no records, and are not read.
    """

    where: str
    source: Source
    records: dict[str, Record]
    checksums: bool
    packed: tuple[str, ...] = ()

    def read(self, reader: HeaderReader, name: str, limit: int) -> bytes:
        """A small record, whole, its CRC32 verified."""
        record = self.records.get(name)
        if record is None:
            raise FormatError(f"{self.where}!{name}", "is missing")
        if record.source.nbytes > limit:
            raise FormatError(
                f"{self.where}!{name}", f"has {record.source.nbytes} bytes; more than {limit} are not read"
            )
        data = reader.read(record.source.offset - self.source.offset, record.source.nbytes, name)
        if self.checksums and zlib.crc32(data) != record.crc:
            raise FormatError(f"{self.where}!{name}", "its bytes do not match its CRC32: damaged")
        return data

    def check(self, reader: HeaderReader) -> None:
        """Verify the CRC32 of every record, a piece at a time."""
        if not self.checksums:
            raise FormatError(self.where, "cannot be checked: it was written without CRC32s")
        for record in self.records.values():
            crc = 0
            for piece in reader.chunks(record.source, CHUNK):
                crc = zlib.crc32(piece, crc)
            if crc != record.crc:
                raise FormatError(f"{self.where}!{record.name}", "its bytes do not match its CRC32: damaged")


def open_archive(reader: HeaderReader, *, packed: bool = False) -> Archive:
    """Parse and check the directory and all local headers. Compressed members are refused, unless there may be `packed` ones."""
    where, source = reader.where, reader.source
    start, nbytes, count = _find_directory(reader)
    entries = _entries(reader.read(start, nbytes, "the directory"), count, where, packed)
    entries.sort(key=lambda e: e.header)
    records: dict[str, Record] = {}
    names: set[str] = set()
    at = 0
    for i, entry in enumerate(entries):
        after = entries[i + 1].header if i + 1 < len(entries) else start
        if entry.name in names:
            raise FormatError(f"{where}!{entry.name}", "is there twice")
        names.add(entry.name)
        if entry.header != at:
            raise FormatError(f"{where}!{entry.name}", f"begins at {entry.header}, the record before it ends at {at}")
        begin, told = _check_local(reader, entry, after)
        if not entry.name.endswith("/") and entry.method == STORED:
            crc_at = (*told, start + entry.row + CENTRAL_CRC)
            records[entry.name] = Record(entry.name, source.inside(begin, entry.size), entry.crc, crc_at)
        at = after
    checksums = any(r.crc for r in records.values())
    return Archive(where, source, records, checksums, tuple(e.name for e in entries if e.method != STORED))


def _find_directory(reader: HeaderReader) -> tuple[int, int, int]:
    """Offset, size and number of rows of the central directory. No comment and no trailing bytes: torch writes none."""
    where, size = reader.where, reader.source.nbytes
    end = size - END.size
    if end < 0:
        raise FormatError(where, f"is too short for a zip file: {size} bytes")
    tail = max(end - LOCATOR.size, 0)
    data = reader.read(tail, size - tail, "the end record")
    magic, disk, cd_disk, here, count, nbytes, start, comment = END.unpack_from(data, end - tail)
    if magic != b"PK\5\6" or comment:
        raise FormatError(where, "does not end with a zip end record: truncated, or followed by other bytes")
    if disk or cd_disk or here != count:
        raise FormatError(where, "is a zip file in several parts")
    stop = end
    if data.startswith(b"PK\6\7") and end >= LOCATOR.size:
        short = (count, nbytes, start)
        stop, (count, nbytes, start) = _find_directory64(reader, data[: LOCATOR.size], tail)
        if any(s not in (v, m) for s, v, m in zip(short, (count, nbytes, start), (MAX16, MAX32, MAX32), strict=True)):
            raise FormatError(where, "its two end records contradict each other")
    if start + nbytes != stop:
        raise FormatError(where, f"its directory, {start}+{nbytes}, does not end where the end record begins, {stop}")
    if nbytes > MAX_DIRECTORY or count * CENTRAL.size > nbytes or count == 0:
        raise FormatError(where, f"its directory of {nbytes} bytes cannot hold {count} records")
    return start, nbytes, count


def _find_directory64(reader: HeaderReader, locator: bytes, end: int) -> tuple[int, tuple[int, int, int]]:
    _, disk, at, disks = LOCATOR.unpack(locator)
    data = reader.read(at, END64.size, "the zip64 end record")
    magic, length, _, _, this_disk, cd_disk, here, count, nbytes, start = END64.unpack(data)
    if magic != b"PK\6\6" or at + 12 + length != end or disk or this_disk or cd_disk or disks > 1 or here != count:
        raise FormatError(reader.where, "its zip64 end record is damaged")
    return at, (count, nbytes, start)


def _entries(data: bytes, count: int, where: str, packed: bool) -> list[_Entry]:
    out: list[_Entry] = []
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > len(data) or data[at : at + 4] != b"PK\1\2":
            raise FormatError(where, f"its directory is damaged at record {len(out)} of {count}")
        entry, at = _entry(data, at, where, packed)
        out.append(entry)
    if at != len(data):
        raise FormatError(where, f"its directory has {len(data) - at} bytes after the last record")
    return out


def _entry(data: bytes, at: int, where: str, may_be_packed: bool) -> tuple[_Entry, int]:
    row = CENTRAL.unpack_from(data, at)
    _, _, _, flags, method, _, _, crc, packed, size, name_len, extra_len, comment_len, disk, _, _, header = row
    name_at = at + CENTRAL.size
    extra_at = name_at + name_len
    end = extra_at + extra_len + comment_len
    if end > len(data):
        raise FormatError(where, "its directory is damaged: a name runs past the end")
    raw = data[name_at:extra_at]
    name = _name(raw, flags, where)
    if flags & ENCRYPTED:
        raise FormatError(f"{where}!{name}", "is encrypted")
    if flags & ~(HAS_DESCRIPTOR | UTF8):
        raise FormatError(f"{where}!{name}", f"has flags {flags:#06x}, which are not understood")
    if method != STORED and not (may_be_packed and method == DEFLATED):
        raise FormatError(
            f"{where}!{name}", f"is compressed (method {method}); torch reads stored records only, and so do we"
        )
    if MAX32 in (size, packed, header):
        extra = data[extra_at : extra_at + extra_len]
        size, packed, header = _wide(extra, (size, packed, header), f"{where}!{name}")
    if (method == STORED and packed != size) or disk or (name.endswith("/") and size):
        raise FormatError(f"{where}!{name}", f"is stored, yet takes {packed} bytes for {size}")
    return _Entry(raw, name, flags, method, crc, packed, size, header, at), end


def _name(raw: bytes, flags: int, where: str) -> str:
    """A member name that is a plain relative path."""
    try:
        name = raw.decode("utf-8" if flags & UTF8 else "ascii")
    except UnicodeDecodeError:
        raise FormatError(where, f"a member name is not text: {raw[:80]!r}") from None
    if "\\" in name or not name.isprintable() or _NOT_PLAIN.search(f"/{name.removesuffix('/')}/"):
        raise FormatError(where, f"the member name {name[:80]!r} is not a plain relative path")
    return name


def _wide(extra: bytes, short: tuple[int, int, int], where: str) -> tuple[int, int, int]:
    """Sizes and offset; those that did not fit in 32 bits are in the zip64 extra field, in this order."""
    field = _extra(extra, where)
    need = [i for i, value in enumerate(short) if value == MAX32]
    if field is None or len(field) < 8 * len(need):
        raise FormatError(where, "its zip64 field is missing or too short")
    wide = list(short)
    for place, value in zip(need, struct.unpack_from(f"<{len(need)}Q", field), strict=True):
        wide[place] = value
    return wide[0], wide[1], wide[2]


def _extra(extra: bytes, where: str) -> bytes | None:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if at + 4 + length > len(extra):
            raise FormatError(where, "its extra fields are damaged")
        if kind == 1:
            return extra[at + 4 : at + 4 + length]
        at += 4 + length
    return None


def _check_local(reader: HeaderReader, entry: _Entry, after: int) -> tuple[int, list[int]]:
    """Hold the local header (and descriptor) against the directory; where the data begins, and where its CRC32 stands."""
    where = f"{reader.where}!{entry.name}"
    head = reader.read(entry.header, LOCAL.size + len(entry.raw), "its local header")
    magic, _, flags, method, _, _, crc, packed, size, name_len, extra_len = LOCAL.unpack_from(head)
    if magic != b"PK\3\4":
        raise FormatError(where, f"has no local header at {entry.header}")
    if name_len != len(entry.raw) or not head.endswith(entry.raw) or (flags, method) != (entry.flags, entry.method):
        raise FormatError(where, "its local header and the directory contradict each other (name, flags or method)")
    if MAX32 in (size, packed):
        extra = reader.read(entry.header + len(head), extra_len, "its extra fields")
        size, packed, _ = _wide(extra, (size, packed, 0), where)
    late = flags & HAS_DESCRIPTOR  # then the values may follow the data, and these be 0
    if (crc, packed, size) != (entry.crc, entry.held, entry.size) and not (late and crc == packed == size == 0):
        raise FormatError(where, "its local header and the directory contradict each other (sizes or CRC32)")
    begin: int = entry.header + len(head) + extra_len
    end = begin + entry.held
    crc_at = [entry.header + LOCAL_CRC] if crc else []
    if late:
        crc_at.append(end + DESCRIPTOR_CRC)
        end += _check_descriptor(reader, entry, end, after)
    if end != after:
        kind = "overlaps the next one" if end > after else "leaves bytes that belong to no record"
        raise FormatError(where, f"{kind}: it ends at {end}, the next begins at {after}")
    return begin, crc_at


def _check_descriptor(reader: HeaderReader, entry: _Entry, at: int, after: int) -> int:
    form = DESCRIPTOR64 if after - at == DESCRIPTOR64.size else DESCRIPTOR
    if at + form.size <= after:
        values = form.unpack(reader.read(at, form.size, "its descriptor"))
        if values == (b"PK\7\x08", entry.crc, entry.held, entry.size):
            return form.size
    raise FormatError(f"{reader.where}!{entry.name}", "its data descriptor is missing or contradicts the directory")
