"""One header block of a tar archive (POSIX, GNU, or older than both), and the pax records that extend it."""

from __future__ import annotations

import re
from typing import NamedTuple

BLOCK = 512
MAX_SIZE = 1 << 62
_POSIX, _GNU, _OLD = b"ustar\x0000", b"ustar  \0", bytes(8)
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_DECIMAL = re.compile(rb"[0-9]{1,19}")
_LENGTH = re.compile(rb"([1-9][0-9]{0,9}) ")
# Records that say nothing of name or data; others than these, `path` and `size` may change what either means.
_HARMLESS = re.compile(
    rb"atime|ctime|mtime|uid|gid|uname|gname|comment|(SCHILY|LIBARCHIVE|RHT)\.(?!realsize).*", re.DOTALL
)


class Damaged(Exception):
    """What is wrong, without the name of the archive. Nothing after it can be found."""


class Header(NamedTuple):
    """What counts of a header. The name is as stored, the prefix of POSIX before it."""

    name: bytes
    kind: bytes
    nbytes: int


class Pax(NamedTuple):
    """What counts of pax records: they say more than the fields of the header that they precede."""

    name: bytes = b""
    nbytes: int | None = None


def read_header(block: bytes) -> Header | None:
    """The header in a block; None for a block of zeros, which ends the archive."""
    if not any(block):
        return None
    told = _octal(block[148:156], "checksum")
    rest = block[:148] + b" " * 8 + block[156:]
    total = sum(rest)
    if told != total and told != total - 256 * sum(byte > 127 for byte in rest):  # some old programs added signed bytes
        raise Damaged(f"is damaged: its bytes add up to {total}, its checksum says {told}")
    magic, kind = block[257:265], block[156:157]
    if magic not in (_POSIX, _GNU, _OLD):
        raise Damaged(f"is of an unknown form: {magic!r}")
    name, prefix = _text(block[:100]), _text(block[345:500])
    if magic == _POSIX and prefix:
        name = prefix + b"/" + name
    return Header(name, kind, _number(block[124:136], "size"))


def pax_of(content: bytes, at: int) -> Pax:
    """The records in the data of a pax header, which begins at `at`."""
    name, nbytes, pos = b"", None, 0
    while pos < len(content):
        length = _LENGTH.match(content, pos)
        end = pos + int(length[1]) if length else -1
        if length is None or end <= length.end() or end > len(content) or content[end - 1 : end] != b"\n":
            raise Damaged(f"the pax header at {at} is damaged at its byte {pos}")
        key, found, value = content[length.end() : end - 1].partition(b"=")
        if found and key == b"path":
            name = value
        elif found and key == b"size" and _DECIMAL.fullmatch(value) and int(value) <= MAX_SIZE:
            nbytes = int(value)
        elif not found or not _HARMLESS.fullmatch(key):
            shown = content[length.end() : end - 1][:60]
            raise Damaged(f"the pax header at {at} has a record that is not understood: {shown!r}")
        pos = end
    return Pax(name, nbytes)


def _text(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]


def _number(raw: bytes, what: str) -> int:
    """Octal digits, or for what they cannot hold a big-endian number behind a set top bit."""
    if not raw[0] & 0x80:
        return _octal(raw, what)
    value = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    if value > MAX_SIZE:  # so are the negative ones
        raise Damaged(f"has a {what} that cannot be: {raw.hex()}")
    return value


def _octal(raw: bytes, what: str) -> int:
    digits = _OCTAL.fullmatch(raw)
    if not digits:
        raise Damaged(f"has no number for its {what}: {raw!r}")
    return int(digits[1], 8)
