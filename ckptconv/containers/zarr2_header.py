"""`.zarray`: what an array of zarr v2 says of itself, read with suspicion and written as zarr-python 2 does."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptconv import coding
from ckptconv.containers import json_file
from ckptconv.dtypes import DTYPES, DType
from ckptconv.errors import FormatError
from ckptconv.source import Source
from ckptconv.tensor import Shape

HEADER = ".zarray"
MAX_HEADER = 1 << 20
MAX_AXES = 32
FIELDS = {"chunks", "compressor", "dtype", "fill_value", "filters", "order", "shape", "zarr_format"}
OPTIONAL = {"dimension_separator"}
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def spelling(dtype: DType) -> str:
    """`<f4`; what is no type of numpy itself goes by its name (`bfloat16`), as Megatron and tensorstore write it."""
    kind = dtype.numpy
    return kind.str if kind.isbuiltin == 1 else kind.name


SPELLINGS = {spelling(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class Header:
    """An array of `shape`, cut in chunks of `chunks`; those at its far edges are stored whole all the same."""

    dtype: DType
    shape: Shape
    chunks: Shape
    fill: int | None = None  # the bits of what is not stored; None: nobody said
    codec: str = ""
    order: str = "C"
    separator: str = "."

    @property
    def grid(self) -> Shape:
        """How many chunks there are along each axis."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.chunks, strict=True))

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def chunk_strides(self) -> Shape:
        """Where the elements of a chunk lie, in bytes."""
        axes = range(len(self.chunks))
        after = (self.chunks[i + 1 :] if self.order == "C" else self.chunks[:i] for i in axes)
        return tuple(self.dtype.itemsize * math.prod(sizes) for sizes in after)

    def name_of(self, index: Shape) -> str:
        """The file of a chunk, by its place in the grid."""
        return self.separator.join(map(str, index)) or "0"

    def start(self, index: Shape) -> Shape:
        """The first element of a chunk."""
        return tuple(i * size for i, size in zip(index, self.chunks, strict=True))


def read(source: Source, where: str) -> Header:
    fields = json_file.parse(json_file.read_bytes(source, MAX_HEADER), where)
    if fields.get("zarr_format") != 2:
        raise FormatError(where, f"has zarr_format {fields.get('zarr_format')!r}, expected 2")
    if problem := ", ".join(sorted(FIELDS - fields.keys())):
        raise FormatError(where, f"does not say {problem}")
    if problem := ", ".join(sorted(fields.keys() - FIELDS - OPTIONAL)):
        raise FormatError(where, f"says {problem}, which zarr v2 does not know")
    dtype = _dtype(fields["dtype"], where)
    shape, chunks = _sizes(fields["shape"], "shape", 0, where), _sizes(fields["chunks"], "chunks", 1, where)
    if len(shape) != len(chunks):
        raise FormatError(where, f"cuts {len(shape)} axes in chunks of {len(chunks)}")
    if fields["filters"] not in (None, []):
        raise FormatError(where, f"has filters {fields['filters']!r}; arrays with filters cannot be read")
    header = Header(
        dtype,
        shape,
        chunks,
        _fill(fields["fill_value"], dtype, where),
        _codec(fields["compressor"], where),
        _one_of("order", fields["order"], ("C", "F"), where),
        _one_of("dimension_separator", fields.get("dimension_separator", "."), (".", "/"), where),
    )
    most = coding.MOST if header.codec else (1 << 63) - 1
    if header.chunk_nbytes > most or math.prod(shape) * dtype.itemsize >= 1 << 63:
        raise FormatError(where, f"has shape {list(shape)} in chunks of {header.chunk_nbytes:,} bytes: too large")
    return header


def render(header: Header) -> bytes:
    """The file's bytes, for an array that is not compressed and has no fill value, as Megatron-Core's are."""
    fields = {
        "chunks": header.chunks,
        "compressor": None,
        "dtype": spelling(header.dtype),
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": header.shape,
        "zarr_format": 2,
    }
    return json.dumps(fields, indent=4, sort_keys=True).encode()


def _dtype(told: object, where: str) -> DType:
    if isinstance(told, str) and told in SPELLINGS:
        return SPELLINGS[told]
    if isinstance(told, str) and told.startswith(">"):
        raise FormatError(where, f"has dtype {told!r}: big-endian values cannot be read")
    raise FormatError(where, f"has dtype {told!r}, expected one of {', '.join(SPELLINGS)}")


def _sizes(told: object, what: str, least: int, where: str) -> Shape:
    if not isinstance(told, list) or len(told) > MAX_AXES or not all(_is_size(n, least) for n in told):
        raise FormatError(where, f"has {what} {str(told)[:80]}, expected up to {MAX_AXES} sizes of at least {least}")
    return tuple(told)


def _is_size(n: object, least: int) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and least <= n < 1 << 63


def _codec(told: object, where: str) -> str:
    if told is None:
        return ""
    codec = told.get("id") if isinstance(told, dict) else None
    if not isinstance(codec, str) or codec not in coding.CODECS:
        raise FormatError(where, f"has compressor {str(told)[:80]}, expected null or one of {sorted(coding.CODECS)}")
    return codec


def _one_of(what: str, told: object, known: tuple[str, ...], where: str) -> str:
    if not isinstance(told, str) or told not in known:
        raise FormatError(where, f"has {what} {told!r}, expected one of {', '.join(map(repr, known))}")
    return told


def _fill(told: object, dtype: DType, where: str) -> int | None:
    """The fill value's bits."""
    if told is None:
        return None
    value: Any = NOT_FINITE.get(told, told) if isinstance(told, str) and dtype.is_float else told
    is_bool = dtype.numpy.kind == "b"
    bits = None
    if isinstance(value, bool) == is_bool and isinstance(value, (int, float) if dtype.is_float else int):
        with suppress(ArithmeticError, ValueError), np.errstate(over="ignore"):
            array: Any = np.asarray(float(value) if dtype.is_float else value).astype(dtype.numpy)
            kept = _kind(float(array)) == _kind(float(value)) if dtype.is_float else int(array) == value
            bits = int.from_bytes(array.tobytes(), "little") if kept else None
    if bits is None:
        raise FormatError(where, f"has fill_value {str(told)[:80]!r}, which is no value of dtype {dtype}")
    return bits


def _kind(number: float) -> tuple[bool, bool]:
    """A float is rounded to the nearest of its dtype, but stays finite, infinite or none."""
    return math.isinf(number), math.isnan(number)
