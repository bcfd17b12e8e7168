"""CRC32s of stretches give that of the whole, and the fast implementation agrees with zlib."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from ckptconv.executor.crc import crc32, crc32_combine


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 2000))
def test_combine_equals_crc_of_both(first: bytes, second: bytes, zeros: int) -> None:
    second += bytes(zeros)
    assert crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_crc32_agrees_with_zlib() -> None:
    assert crc32(b"abc", 0) == zlib.crc32(b"abc")
    assert crc32(b"def", crc32(b"abc", 0)) == zlib.crc32(b"abcdef")


def test_combine_of_large_pieces() -> None:
    piece = bytes(range(256)) * 65536
    assert crc32_combine(zlib.crc32(piece), zlib.crc32(piece), len(piece)) == zlib.crc32(piece + piece)
