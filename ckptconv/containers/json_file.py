"""JSON files that others wrote: small enough, one value per key, no NaN; else a FormatError that names the file."""

from __future__ import annotations

import json
from typing import NoReturn

from ckptconv.containers.ranges import HeaderReader, Place, locate
from ckptconv.errors import FormatError

MAX_CONFIG = 16_000_000
MAX_INDEX = 48_000_000


def read(place: Place, limit: int = MAX_CONFIG) -> dict[str, object]:
    """The table a JSON file holds."""
    return parse(read_bytes(place, limit), str(locate(place).path))


def read_bytes(place: Place, limit: int = MAX_CONFIG) -> bytes:
    """The file itself, if it is not larger than anything sensible."""
    source = locate(place)
    if source.nbytes > limit:
        raise FormatError(source.path, f"has {source.nbytes} bytes; more than {limit} is no file of this kind")
    with HeaderReader(source, source.path) as reader:
        return reader.read(0, source.nbytes, "the file") if source.nbytes else b""


def parse(text: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(where, f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(where, f"holds a {type(value).__name__}, expected a table {{…}}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} is there twice")
        out[key] = value
    return out


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")
