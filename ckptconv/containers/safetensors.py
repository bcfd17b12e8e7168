"""safetensors files: the header as lazy tensors, and the layout of a new file, byte for byte the library's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from reprlib import repr as short_repr
from typing import NoReturn

from ckptconv.containers.ranges import HeaderReader, Place, locate
from ckptconv.dtypes import BY_SAFETENSORS, DType
from ckptconv.errors import FormatError
from ckptconv.leaves import contiguous
from ckptconv.plan import File, Segment
from ckptconv.tensor import Shape, Tensor

MAX_HEADER = 100_000_000  # the library refuses more
MAX_NBYTES = 1 << 62
METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}

# The library sorts by its Dtype enum, last one first, then by name; hence this order and not one by size alone.
_ORDER = (
    "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ "
    "I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
)
_RANK = {code: i for i, code in enumerate(_ORDER.split())}
_quoted = json.encoder.encode_basestring


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What a file holds: tensors in the order of their bytes, and the free-form metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


# Begin and end in the body, name, what is there: a bare tuple, for thousands are made and sorted
_Entry = tuple[int, int, str, DType, Shape]


def _entry(name: str, info: object) -> _Entry:
    """One header entry, checked by itself: its byte range is still to be held against its neighbours'."""
    if not isinstance(info, dict) or len(info) != 3 or not _FIELDS.issubset(info):
        raise ValueError("an entry has exactly dtype, shape and data_offsets")
    code, shape, offsets = info["dtype"], _naturals(info["shape"]), _naturals(info["data_offsets"])
    if not isinstance(code, str):
        raise ValueError(f"dtype {short_repr(code)} is not a name")
    if len(offsets) != 2:
        raise ValueError("data_offsets are not two numbers")
    dtype, expected = _extent(code, shape)
    begin, end = offsets
    if end - begin != expected:
        raise ValueError(
            f"{dtype.safetensors} {list(shape)} takes {expected} bytes, data_offsets {begin}..{end} give {end - begin}"
        )
    return begin, end, name, dtype, shape


def read(path: Place, where: str = "") -> SafetensorsFile:
    """Parse and check the header; no tensor byte is read."""
    source = locate(path)
    where = where or source.path
    with HeaderReader(source, where) as reader:
        length = int.from_bytes(reader.read(0, 8, "the header length"), "little")
        if not 2 <= length <= min(MAX_HEADER, source.nbytes - 8):
            raise FormatError(
                where, f"header of {length} bytes in a file of {source.nbytes} (not safetensors, or truncated)"
            )
        header = _parse(reader.read(8, length, "the header"), where)
    metadata = _metadata(header.pop(METADATA, {}), where)
    entries = []
    for name, info in header.items():
        try:
            entries.append(_entry(name, info))
        except ValueError as error:
            raise FormatError(f"{where}!{name}", str(error)) from None
    entries.sort()
    body = source.inside(8 + length, source.nbytes - 8 - length)
    _check_tiling(entries, body.nbytes, where)
    tensors = {
        name: contiguous(body.inside(begin, end - begin), shape, dtype) for begin, end, name, dtype, shape in entries
    }
    return SafetensorsFile(tensors, metadata)


def layout(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> File:
    """The file the library would write for these tensors: aligned dtypes first, then by name."""
    if METADATA in tensors:
        raise FormatError(path, f"a tensor cannot be called {METADATA}")
    ordered = sorted(tensors.items(), key=lambda kv: (-_RANK[kv[1].dtype.safetensors], kv[0]))
    rows = [f"{_quoted(METADATA)}:{_compact(dict(metadata))}"] if metadata else []
    at, begins = 0, []
    for name, tensor in ordered:
        end = at + tensor.nbytes
        rows.append(f'{_quoted(name)}:{{{_kind(tensor.dtype, tensor.shape)},"data_offsets":[{at},{end}]}}')
        begins.append(at)
        at = end
    text = f"{{{','.join(rows)}}}".encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise FormatError(
            path, f"a header of {len(text)} bytes: readers refuse more than {MAX_HEADER}; use more shards"
        )
    start = 8 + len(text)
    segments = [Segment(0, len(text).to_bytes(8, "little") + text)]
    segments += [Segment(start + b, tensor, name) for b, (name, tensor) in zip(begins, ordered, strict=True)]
    return File(path, start + at, tuple(segments))


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@lru_cache
def _kind(dtype: DType, shape: Shape) -> str:
    """What entries of many tensors have in common."""
    return f'"dtype":{_compact(dtype.safetensors)},"shape":{_compact([int(n) for n in shape])}'


def _parse(text: bytes, where: str) -> dict[str, object]:
    if not text.startswith(b"{"):
        raise FormatError(where, "the header does not begin with '{'")
    try:
        return _quickly(text) or json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(where, f"the header is not valid: {error}") from None


def _quickly(text: bytes) -> dict[str, object] | None:
    """The header, if no key can be there twice; to look at every object as it is parsed takes twice as long.

    In a header without white space every key is followed by `":`, and strings can only add to these: where there are no
    more than the keys of sound entries, three each, all keys are there once. (Entries that are not sound are refused.)
    """
    inside = text.rstrip()
    if any(space in inside for space in b" \t\n\r"):
        return None
    header: dict[str, object] = json.loads(inside.decode(), parse_constant=_no_constant)
    metadata = header.get(METADATA)
    within = len(metadata) - 3 if isinstance(metadata, dict) else 0
    return header if text.count(b'":') == 4 * len(header) + within else None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return out


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(where, f"{METADATA} is not a table of strings")
    return value


@lru_cache
def _extent(code: str, shape: Shape) -> tuple[DType, int]:
    """The type a code stands for, and how many bytes such a tensor takes."""
    dtype = BY_SAFETENSORS.get(code)
    if dtype is None:
        hint = " (sub-byte, complex and unsigned-zero types are not supported)" if code in _RANK else ""
        raise ValueError(f"dtype {short_repr(code)} is unknown{hint}")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > MAX_NBYTES or (0 in shape and max(shape) > MAX_NBYTES):
        raise ValueError(f"shape {list(shape)} overflows")
    return dtype, nbytes


def _naturals(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{short_repr(value)} is not a list")
    for n in value:
        if type(n) is not int or n < 0:  # bool is an int in Python, and not here
            raise ValueError(f"{short_repr(n)} is not a number of 0 or more")
    return tuple(value)


def _check_tiling(entries: list[_Entry], nbytes: int, where: str) -> None:
    """Tensors follow each other without hole or overlap and end with the file."""
    at = 0
    for begin, end, name, *_ in entries:
        if begin != at:
            kind = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise FormatError(f"{where}!{name}", f"begins at {begin} and {kind}, which ends at {at}")
        at = end
    if at != nbytes:
        what = "truncated" if at > nbytes else "bytes that belong to no tensor"
        raise FormatError(where, f"tensors take {at} bytes, the file has {nbytes} for them: {what}")
