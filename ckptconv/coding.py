"""Files whose bytes are compressed: how a source says so (plain text), and the `Opened` that decodes them.

Only whole files are coded (a chunk of a zarr array), each with one codec. tensorstore, of the extra `zarr`, knows them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ckptconv.errors import ExtraMissingError, FormatError
from ckptconv.source import Opened, Origin

CODECS = frozenset({"blosc", "bz2", "gzip", "zlib", "zstd"})  # as zarr v2 names them
MOST = (1 << 31) - 1  # decoded bytes of one file, all of which are in memory at once
_PIECE = 16 << 20


def coding(codec: str, nbytes: int) -> str:
    """What a `Source` carries: decoding with this codec gives that many bytes. Parameters matter to encoders only."""
    return f"{codec}:{nbytes}"


def most_encoded(nbytes: int) -> int:
    """The largest file that decodes to so many bytes: what cannot be compressed grows a little."""
    return nbytes + nbytes // 8 + (1 << 16)


def require() -> Any:
    """The library that decodes, or the error that says how to get it."""
    try:
        import tensorstore
    except ImportError:
        raise ExtraMissingError("reading compressed zarr chunks", "zarr") from None
    return tensorstore


class Decoded:
    """`Opened` for what a coded file holds: decoded whole, kept until closed."""

    def __init__(self, file: Opened, origin: Origin) -> None:
        codec, _, nbytes = origin.coding.partition(":")
        try:
            encoded = _read_all(file, origin.path, most_encoded(int(nbytes)))
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


def _read_all(file: Opened, path: str, most: int) -> bytes:
    data = bytearray()
    buffer = memoryview(bytearray(min(most + 1, _PIECE)))
    while got := file.read_into(len(data), [buffer]):
        data += buffer[:got]
        if len(data) > most:
            raise FormatError(path, f"has more than {most} bytes, too many for what .zarray says it decodes to")
    return bytes(data)


def _decode(codec: str, encoded: bytes, nbytes: int, path: str) -> memoryview:
    """The bytes as an array of one chunk, which tensorstore reads: it refuses what is not of exactly this size."""
    tensorstore = require()
    if codec == "blosc" and len(encoded) >= 8 and (told := int.from_bytes(encoded[4:8], "little")) != nbytes:
        # told apart beforehand: the library would first make room for whatever this header says
        raise FormatError(path, f"decodes to {told} bytes, .zarray says {nbytes}")
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
        raise FormatError(path, f"cannot be decoded as {codec} of {nbytes} bytes: {error}") from None
    return np.ascontiguousarray(data, np.uint8).data
