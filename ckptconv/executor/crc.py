"""CRC32 of pieces, and of a whole from those of its pieces: isal where it is installed (extra `fast`), else zlib."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

_POLYNOMIAL = 0xEDB88320  # the zip polynomial, bits reversed
_ONE = 0x80000000  # x**0 in the same order

Crc32 = Callable[[Any, int], int]


def _fastest() -> Crc32:
    """Three times as fast as zlib where the extra is installed."""
    try:
        found: Crc32 = import_module("isal.isal_zlib").crc32
    except ImportError:
        found = zlib.crc32
    return found


crc32: Crc32 = _fastest()


def crc32_combine(first: int, second: int, nbytes: int) -> int:
    """The CRC32 of two stretches of bytes, from that of each; `nbytes` is the length of the second."""
    return _times(_shift(nbytes), first) ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's."""
    product, mask = 0, _ONE
    while mask:
        if a & mask:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        mask >>= 1
    return product


@lru_cache(maxsize=256)
def _shift(nbytes: int) -> int:
    """x ** (8 * nbytes): what that many bytes behind it do to a CRC. By squaring, as lengths are large."""
    power, square, n = _ONE, _ONE >> 8, nbytes
    while n:
        if n & 1:
            power = _times(power, square)
        square, n = _times(square, square), n >> 1
    return power
