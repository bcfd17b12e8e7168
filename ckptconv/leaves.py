"""Tensors made from byte ranges and constants: what loaders begin with."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from ckptconv.dtypes import DType
from ckptconv.nodes import Fill, View
from ckptconv.source import Source
from ckptconv.tensor import Tensor, row_major


def view(source: Source, offset: int, shape: Iterable[int], strides: Iterable[int], dtype: DType) -> Tensor:
    """A window, in normal form: strides in bytes, 0 for axes of size 1; nothing to read is a Fill."""
    shape = tuple(shape)
    if 0 in shape:
        return Fill(shape, dtype)
    strides = tuple(s if n > 1 else 0 for n, s in zip(shape, strides, strict=True))
    return View(source, offset, shape, strides, dtype)


def contiguous(source: Source, shape: Iterable[int], dtype: DType) -> Tensor:
    """The whole byte range as one row-major tensor."""
    shape = tuple(shape)
    if math.prod(shape) * dtype.itemsize != source.nbytes:
        raise ValueError(f"{source.nbytes} bytes are not a {dtype} tensor of shape {shape}")
    return View(source, 0, shape, row_major(shape, dtype.itemsize), dtype) if source.nbytes else Fill(shape, dtype)


def full(shape: Iterable[int], dtype: DType, value: float) -> Tensor:
    """Every element the same value."""
    return Fill(tuple(shape), dtype, int.from_bytes(np.asarray(value).astype(dtype.numpy).tobytes(), "little"))
