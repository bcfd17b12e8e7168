"""Compressed byte ranges: how a source says what decodes it (plain text), and the `Opened` that does.

Offsets of a coded source count decoded bytes. tensorstore, of the extra `zarr`, knows the codecs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptconv.errors import ExtraMissingError, FormatError
from ckptconv.source import Opened, Origin, Source

CODECS = frozenset({"blosc", "bz2", "gzip", "zlib", "zstd"})  # as zarr v2 names them
MOST = (1 << 31) - 1  # decoded bytes of one source, all of which are in memory at once


def coded(encoded: Source, codec: str, nbytes: int) -> Source:
    """What a compressed range decodes to; how it was compressed (level, shuffle) is no matter for that."""
    return Source(encoded.path, 0, nbytes, f"{codec}:{encoded.offset}+{encoded.nbytes}:{nbytes}")


def require() -> Any:
    """The library that decodes, or the error that says how to get it."""
    try:
        import tensorstore
    except ImportError:
        raise ExtraMissingError("reading compressed zarr chunks", "zarr") from None
    return tensorstore


class Decoded:
    """`Opened` for a coded source: decoded whole, kept until closed."""

    def __init__(self, file: Opened, origin: Origin) -> None:
        codec, place, nbytes = origin.coding.split(":")
        try:
            encoded = _read(file, origin.path, *map(int, place.split("+")))
        finally:
            file.close()
        self._data = _decode(codec, encoded, int(nbytes), origin.path)

    def read_into(self, offset: int, buffers: list[memoryview]) -> int:
        start = offset
        for buffer in buffers:
            part = self._data[offset : offset + len(buffer)]
            buffer[: len(part)] = part
            offset += len(part)
        return offset - start

    def close(self) -> None:
        self._data = memoryview(b"")


def _read(file: Opened, path: str, offset: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    view, at = memoryview(data), 0
    while at < nbytes:
        got = file.read_into(offset + at, [view[at:]])
        if not got:
            raise FormatError(path, f"ends at byte {offset + at}, {nbytes - at} more are expected; is it truncated?")
        at += got
    return data


def _decode(codec: str, encoded: bytearray, nbytes: int, path: str) -> memoryview:
    """The bytes as an array of one chunk, which tensorstore reads: it refuses what is not of exactly this size."""
    tensorstore = require()
    if codec == "blosc" and len(encoded) >= 8 and (told := int.from_bytes(encoded[4:8], "little")) != nbytes:
        # looked at beforehand: the library would first make room for whatever this header says
        raise FormatError(path, f"decodes to {told:,} bytes, {nbytes:,} are expected")
    metadata = {
        "zarr_format": 2,
        "shape": [nbytes],
        "chunks": [nbytes],
        "dtype": "|u1",
        "compressor": {"id": codec},
        "filters": None,
        "fill_value": None,
        "order": "C",
    }
    store = {"driver": "memory"}
    spec = {"driver": "zarr", "kvstore": store, "metadata": metadata, "assume_metadata": True}
    context = tensorstore.Context()
    try:
        tensorstore.KvStore.open(store, context=context).result().write("0", encoded).result()
        data: Any = tensorstore.open(spec, context=context).result().read().result()
    except ValueError as error:
        raise FormatError(path, f"does not decode as {codec} to {nbytes:,} bytes: {error}") from None
    return np.ascontiguousarray(data, np.uint8).data
