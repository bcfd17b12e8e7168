"""The five kinds of lazy tensor, and how neighbours join into one.

Constructors simplify at once (adjacent windows of a file become one window, a fold meeting its unfold vanishes), so two recipes
can be compared, and taking apart what was put together gives back the very leaf it began with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptconv.dtypes import DType
from ckptconv.moves import Move, ValueFn, make
from ckptconv.shapes import Shape, dropped, inserted, merged, sized, two
from ckptconv.source import Source
from ckptconv.tensor import Tensor


class Node(Tensor):
    """What all kinds share: how each may turn into another kind."""

    __slots__ = ()

    def map(self, fn: ValueFn, dtype: DType) -> Tensor:
        return Map(self, fn, dtype)

    def _empty(self, axis: int) -> Tensor:
        return Fill(sized(self.shape, axis, 0), self.dtype)

    def _fold(self, axis: int) -> Tensor:
        return Fold(self, axis)


@dataclass(unsafe_hash=True, slots=True)  # never assigned to; but frozen ones take four times as long to make
class View(Node):
    """A strided window on a byte range: `offset` and `strides` in bytes; an axis of size 1 has stride 0."""

    source: Source
    offset: int
    shape: Shape
    strides: Shape
    dtype: DType

    def _narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        stride, n = self.strides[axis], hi - lo
        strides = sized(self.strides, axis, 0 if n == 1 else stride)
        return View(self.source, self.offset + lo * stride, sized(self.shape, axis, n), strides, self.dtype)

    def _permute(self, order: Shape) -> Tensor:
        return self._seen(tuple(self.shape[i] for i in order), tuple(self.strides[i] for i in order))

    def _unfold(self, axis: int, n: int, m: int) -> Tensor:
        stride = self.strides[axis]
        return self._seen(two(self.shape, axis, n, m), two(self.strides, axis, stride * m, stride))

    def _fold(self, axis: int) -> Tensor:
        if self.strides[axis] != self.shape[axis + 1] * self.strides[axis + 1]:
            return Fold(self, axis)
        return self._seen(merged(self.shape, axis), dropped(self.strides, axis))

    def unsqueeze(self, axis: int) -> Tensor:
        return self._seen(inserted(self.shape, axis, 1), inserted(self.strides, axis, 0))

    def _squeeze(self, axis: int) -> Tensor:
        return self._seen(dropped(self.shape, axis), dropped(self.strides, axis))

    def _expand(self, axis: int, n: int) -> Tensor:
        return self._seen(sized(self.shape, axis, n), self.strides)

    def _seen(self, shape: Shape, strides: Shape) -> View:
        """The same bytes, seen so."""
        return View(self.source, self.offset, shape, strides, self.dtype)

    def _lower(self, out: int, out_strides: Shape, out_item: int, fns: tuple[ValueFn, ...]) -> list[Move]:
        at = self.source.offset + self.offset
        return [make(self.source, at, self.shape, self.strides, out, out_strides, self.dtype.itemsize, out_item, fns)]


@dataclass(frozen=True, slots=True)
class Fill(Node):
    """A constant; `bits` is its value as the dtype's bit pattern."""

    shape: Shape
    dtype: DType
    bits: int = 0

    def _narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        return replace(self, shape=sized(self.shape, axis, hi - lo))

    def _permute(self, order: Shape) -> Tensor:
        return replace(self, shape=tuple(self.shape[i] for i in order))

    def _unfold(self, axis: int, n: int, m: int) -> Tensor:
        return replace(self, shape=two(self.shape, axis, n, m))

    def _fold(self, axis: int) -> Tensor:
        return replace(self, shape=merged(self.shape, axis))

    def unsqueeze(self, axis: int) -> Tensor:
        return replace(self, shape=inserted(self.shape, axis, 1))

    def _squeeze(self, axis: int) -> Tensor:
        return replace(self, shape=dropped(self.shape, axis))

    def _expand(self, axis: int, n: int) -> Tensor:
        return replace(self, shape=sized(self.shape, axis, n))

    def _lower(self, out: int, out_strides: Shape, out_item: int, fns: tuple[ValueFn, ...]) -> list[Move]:
        zero = (0,) * len(self.shape)
        return [make(None, self.bits, self.shape, zero, out, out_strides, self.dtype.itemsize, out_item, fns)]


@dataclass(frozen=True, slots=True)
class Map(Node):
    """A value function of every element. Layout passes through it to the child."""

    child: Tensor
    fn: ValueFn
    dtype: DType

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.child.shape

    def _narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        return replace(self, child=self.child.narrow(axis, lo, hi))

    def _permute(self, order: Shape) -> Tensor:
        return replace(self, child=self.child.permute(order))

    def _unfold(self, axis: int, n: int, m: int) -> Tensor:
        return replace(self, child=self.child.unfold(axis, n, m))

    def _fold(self, axis: int) -> Tensor:
        return replace(self, child=self.child.fold(axis))

    def unsqueeze(self, axis: int) -> Tensor:
        return replace(self, child=self.child.unsqueeze(axis))

    def _squeeze(self, axis: int) -> Tensor:
        return replace(self, child=self.child.squeeze(axis))

    def _expand(self, axis: int, n: int) -> Tensor:
        return replace(self, child=self.child.expand(axis, n))

    def _lower(self, out: int, out_strides: Shape, out_item: int, fns: tuple[ValueFn, ...]) -> list[Move]:
        return self.child._lower(out, out_strides, out_item, (self.fn, *fns))


@dataclass(frozen=True, slots=True)
class Fold(Node):
    """Axes (axis, axis+1) of the child seen as one where no strides can say so; both are longer than 1."""

    child: Tensor
    axis: int

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return merged(self.child.shape, self.axis)

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return self.child.dtype

    def _outer(self, axis: int) -> int:
        """Where an axis of this tensor (other than the folded one) stands in the child."""
        return axis + (axis > self.axis)

    def _rows(self) -> Tensor:
        a = self.axis
        rows = [self.child.narrow(a, i, i + 1).squeeze(a) for i in range(self.child.shape[a])]
        return concat(rows, a)

    def _narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        a, child, m = self.axis, self.child, self.child.shape[self.axis + 1]
        if axis != a:
            return child.narrow(self._outer(axis), lo, hi).fold(a)

        def row(i: int, start: int, end: int) -> Tensor:
            return child.narrow(a, i, i + 1).squeeze(a).narrow(a, start, end)

        first, end = -(-lo // m), hi // m  # whole rows lie in first..end
        if first > end:
            return row(end, lo - end * m, hi - end * m)
        parts = []
        if lo < first * m:
            parts.append(row(first - 1, lo - (first - 1) * m, m))
        if first < end:
            parts.append(child.narrow(a, first, end).fold(a))
        if end * m < hi:
            parts.append(row(end, 0, hi - end * m))
        return concat(parts, a)

    def _permute(self, order: Shape) -> Tensor:
        inner = [self._outer(k) for k in order]
        at = inner.index(self.axis)
        inner[at : at + 1] = [self.axis, self.axis + 1]
        return self.child.permute(inner).fold(at)

    def _unfold(self, axis: int, n: int, m: int) -> Tensor:
        a, width = self.axis, self.child.shape[self.axis + 1]
        if axis != a:
            return self.child.unfold(self._outer(axis), n, m).fold(a + (a > axis))
        if m == width:
            return self.child
        if m % width == 0:
            return self.child.unfold(a, n, m // width).fold(a + 1)
        if width % m == 0:
            return self.child.unfold(a + 1, width // m, m).fold(a)
        return self._rows().unfold(axis, n, m)

    def unsqueeze(self, axis: int) -> Tensor:
        return self.child.unsqueeze(self._outer(axis)).fold(self.axis + (axis <= self.axis))

    def _squeeze(self, axis: int) -> Tensor:
        return self.child.squeeze(self._outer(axis)).fold(self.axis - (self.axis > axis))

    def _expand(self, axis: int, n: int) -> Tensor:
        return self.child.expand(self._outer(axis), n).fold(self.axis)

    def _lower(self, out: int, out_strides: Shape, out_item: int, fns: tuple[ValueFn, ...]) -> list[Move]:
        stride, m = out_strides[self.axis], self.child.shape[self.axis + 1]
        return self.child._lower(out, two(out_strides, self.axis, stride * m, stride), out_item, fns)


@dataclass(frozen=True, slots=True)
class Concat(Node):
    """Parts joined along an axis; no two neighbours could be one node."""

    parts: tuple[Tensor, ...]
    axis: int
    shape: Shape

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return self.parts[0].dtype

    def _narrow(self, axis: int, lo: int, hi: int) -> Tensor:
        if axis != self.axis:
            return concat([p.narrow(axis, lo, hi) for p in self.parts], self.axis)
        out, at = [], 0
        for part in self.parts:
            n = part.shape[axis]
            start, end = max(lo - at, 0), min(hi - at, n)
            if start < end:
                out.append(part.narrow(axis, start, end))
            at += n
            if at >= hi:
                break
        return concat(out, axis)

    def _permute(self, order: Shape) -> Tensor:
        return concat([p.permute(order) for p in self.parts], order.index(self.axis))

    def _unfold(self, axis: int, n: int, m: int) -> Tensor:
        if axis != self.axis:
            return concat([p.unfold(axis, n, m) for p in self.parts], self.axis + (self.axis > axis))
        if all(p.shape[axis] % m == 0 for p in self.parts):
            return concat([p.unfold(axis, p.shape[axis] // m, m) for p in self.parts], axis)
        return self._unfold_straddling(axis, m)

    def _unfold_straddling(self, axis: int, m: int) -> Tensor:
        """Rows of m where part borders fall inside rows: whole rows stay in one piece, so the result has O(parts) pieces."""
        out: list[Tensor] = []
        row: list[Tensor] = []
        need = m
        for part in self.parts:
            at, size = 0, part.shape[axis]
            if row:
                at = min(need, size)
                row.append(part.narrow(axis, 0, at))
                need -= at
                if need:
                    continue
                out.append(concat(row, axis).unsqueeze(axis))
                row, need = [], m
            whole = (size - at) // m
            if whole:
                out.append(part.narrow(axis, at, at + whole * m).unfold(axis, whole, m))
                at += whole * m
            if at < size:
                row, need = [part.narrow(axis, at, size)], m - (size - at)
        return concat(out, axis)

    def _fold(self, axis: int) -> Tensor:
        if self.axis == axis + 1:
            return Fold(self, axis)
        return concat([p.fold(axis) for p in self.parts], self.axis - (self.axis > axis))

    def unsqueeze(self, axis: int) -> Tensor:
        return concat([p.unsqueeze(axis) for p in self.parts], self.axis + (self.axis >= axis))

    def _squeeze(self, axis: int) -> Tensor:
        return concat([p.squeeze(axis) for p in self.parts], self.axis - (self.axis > axis))

    def _expand(self, axis: int, n: int) -> Tensor:
        return concat([p.expand(axis, n) for p in self.parts], self.axis)

    def _lower(self, out: int, out_strides: Shape, out_item: int, fns: tuple[ValueFn, ...]) -> list[Move]:
        moves: list[Move] = []
        for part in self.parts:
            moves += part._lower(out, out_strides, out_item, fns)
            out += part.shape[self.axis] * out_strides[self.axis]
        return moves


def concat(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors of one dtype and, but for `axis`, one shape, joined; neighbours that are one window become one."""
    flat: list[Tensor] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Concat) and part.axis == axis else (part,):
            _check_alike(parts[0], piece, axis)
            if piece.shape[axis] == 0:
                continue
            joined = _join(flat[-1], piece, axis) if flat else None
            if joined is None:
                flat.append(piece)
            else:
                flat[-1] = joined
    if len(flat) < 2:
        return flat[0] if flat else parts[0]
    return Concat(tuple(flat), axis, sized(flat[0].shape, axis, sum(p.shape[axis] for p in flat)))


def _check_alike(a: Tensor, b: Tensor, axis: int) -> None:
    if a.dtype != b.dtype:
        raise ValueError(f"concat of {a.dtype} and {b.dtype}: only a cast may change a dtype")
    if a.shape != b.shape and dropped(a.shape, axis) != dropped(b.shape, axis):
        raise ValueError(f"concat of shapes {a.shape} and {b.shape} along axis {axis}")


def _join(a: Tensor, b: Tensor, axis: int) -> Tensor | None:
    """One node for two neighbours, where there is one."""
    if isinstance(a, View) and isinstance(b, View):
        return _join_views(a, b, axis)
    if isinstance(a, Fill) and isinstance(b, Fill) and a.bits == b.bits:
        return replace(a, shape=sized(a.shape, axis, a.shape[axis] + b.shape[axis]))
    if isinstance(a, Map) and isinstance(b, Map) and a.fn == b.fn and a.dtype == b.dtype:
        child = _join(a.child, b.child, axis)
        return None if child is None else Map(child, a.fn, a.dtype)
    if isinstance(a, Fold) and isinstance(b, Fold) and a.axis == b.axis:
        return _join_folds(a, b, axis)
    if isinstance(a, Concat) and isinstance(b, Concat) and a.axis == b.axis != axis:
        return _join_concats(a, b, axis)
    return None


def _join_views(a: View, b: View, axis: int) -> Tensor | None:
    if a.source != b.source:
        return None
    n, k = a.shape[axis], b.shape[axis]
    stride = a.strides[axis] if n > 1 else b.strides[axis] if k > 1 else b.offset - a.offset
    same = all(x == y for i, (x, y) in enumerate(zip(a.strides, b.strides, strict=True)) if i != axis)
    if not same or stride <= 0 or b.offset != a.offset + n * stride or (k > 1 and b.strides[axis] != stride):
        return None
    return View(a.source, a.offset, sized(a.shape, axis, n + k), sized(a.strides, axis, stride), a.dtype)


def _join_concats(a: Concat, b: Concat, axis: int) -> Tensor | None:
    """Neighbours made of the same columns are joined column by column, if every one of them can be."""
    if [p.shape[a.axis] for p in a.parts] != [p.shape[a.axis] for p in b.parts]:
        return None
    joined = []
    for x, y in zip(a.parts, b.parts, strict=True):
        one = _join(x, y, axis)
        if one is None:
            return None
        joined.append(one)
    return concat(joined, a.axis)


def _join_folds(a: Fold, b: Fold, axis: int) -> Tensor | None:
    """Neighbours behind a fold are joined in front of it, where the child stays one node."""
    k = a.axis
    if axis == k:
        if a.child.shape[k + 1] != b.child.shape[k + 1]:
            return None
        child = _join(a.child, b.child, k)
    else:
        if a.child.shape[k : k + 2] != b.child.shape[k : k + 2]:
            return None
        child = _join(a.child, b.child, axis + (axis > k))
    return None if child is None else child.fold(k)
