"""Lazy tensors: a shape, a dtype and a recipe over byte ranges. Here is what any of them can do; `nodes.py` has the five kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ckptconv.dtypes import DType
from ckptconv.moves import Move, Reader, ValueFn
from ckptconv.shapes import Shape as Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Tensor:
    """A lazy array. Immutable; the layout methods cost O(pieces) and never touch data."""

    __slots__ = ()
    shape: Shape
    dtype: DType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        """Entries lo..hi of one axis."""
        if not 0 <= lo <= hi <= self.shape[axis]:
            raise ValueError(f"narrow({axis}, {lo}, {hi}) outside shape {self.shape}")
        if (lo, hi) == (0, self.shape[axis]):
            return self
        if lo == hi:
            return self._empty(axis)
        return self._narrow(axis, lo, hi)

    def permute(self, order: Sequence[int]) -> Tensor:
        order = tuple(order)
        if sorted(order) != list(range(len(self.shape))):
            raise ValueError(f"permute({order}) of shape {self.shape}")
        return self if order == tuple(range(len(order))) else self._permute(order)

    def unfold(self, axis: int, n: int, m: int) -> Tensor:
        """One axis of size n*m seen as two, n by m."""
        if n * m != self.shape[axis]:
            raise ValueError(f"unfold({axis}, {n}, {m}) of shape {self.shape}")
        if n == 1 and m:
            return self.unsqueeze(axis)
        if m == 1:
            return self.unsqueeze(axis + 1)
        return self._unfold(axis, n, m)

    def fold(self, axis: int) -> Tensor:
        """Axes (axis, axis+1) seen as one: the inverse of unfold."""
        n, m = self.shape[axis], self.shape[axis + 1]
        if n == 1:
            return self.squeeze(axis)
        if m == 1:
            return self.squeeze(axis + 1)
        return self._fold(axis)

    def unsqueeze(self, axis: int) -> Tensor:
        """A new axis of size 1."""
        raise NotImplementedError

    def squeeze(self, axis: int) -> Tensor:
        """An axis of size 1 taken away."""
        if self.shape[axis] != 1:
            raise ValueError(f"squeeze({axis}) of shape {self.shape}")
        return self._squeeze(axis)

    def expand(self, axis: int, n: int) -> Tensor:
        """An axis of size 1 repeated n times."""
        if self.shape[axis] != 1:
            raise ValueError(f"expand({axis}, {n}) of shape {self.shape}")
        if n == 0:
            return self._empty(axis)
        return self if n == 1 else self._expand(axis, n)

    def map(self, fn: ValueFn, dtype: DType) -> Tensor:
        """The elementwise function `fn` of every value; the only thing that changes a dtype."""
        raise NotImplementedError

    def lower(self, at: int = 0) -> list[Move]:
        """The tree as strided byte boxes from source to destination (row-major, from byte `at` on): all the executor ever
        sees of a tensor.
        """
        itemsize = self.dtype.itemsize
        return [] if 0 in self.shape else self._lower(at, row_major(self.shape, itemsize), itemsize, ())

    def numpy(self) -> NDArray[np.generic]:
        """Read the whole tensor into a new array."""
        out = np.empty(self.nbytes, np.uint8)
        if self.nbytes:
            with Reader() as reader:
                reader.fill(self.lower(), out, 0)
        return out.view(self.dtype.numpy).reshape(self.shape)

    # what each kind of node implements; arguments are already checked and not trivial
    def _narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        raise NotImplementedError

    def _permute(self, order: Shape) -> Tensor:
        raise NotImplementedError

    def _unfold(self, axis: int, n: int, m: int) -> Tensor:
        raise NotImplementedError

    def _fold(self, axis: int) -> Tensor:
        raise NotImplementedError

    def _empty(self, axis: int) -> Tensor:
        raise NotImplementedError

    def _squeeze(self, axis: int) -> Tensor:
        raise NotImplementedError

    def _expand(self, axis: int, n: int) -> Tensor:
        raise NotImplementedError

    def _lower(self, out: int, out_strides: Shape, out_item: int, fns: tuple[ValueFn, ...]) -> list[Move]:
        raise NotImplementedError


@lru_cache
def row_major(shape: Shape, itemsize: int) -> Shape:
    """The strides, in bytes, of an array without gaps; 0 for axes of size 1."""
    strides = []
    for size in reversed(shape):
        strides.append(itemsize if size > 1 else 0)
        itemsize *= size
    return tuple(reversed(strides))
