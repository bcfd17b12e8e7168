"""Moves: what a lazy tensor means in bytes, and the Reader that carries them out; no file is mapped or written here.

A tensor lowers to strided boxes source -> destination, `clip` cuts them by destination byte range, `Reader.fill` reads
them with few large reads into reused buffers (fresh pages cost three times the copy).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ckptconv.coding import opened
from ckptconv.errors import FormatError
from ckptconv.source import LocalFile, Opened, Origin, Source
from ckptconv.values import NO_LOSS, UINT, Array, Chain, Loss, ValueFn, constant

__all__ = ["Bytes", "Loss", "Move", "Reader", "Span", "ValueFn", "clip", "clipped", "make"]

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]

RUN = 64 << 10  # a run this long is read straight into the destination
SEEK = 16 << 10  # what one more read costs, in bytes copied (about 2 us)
GAP = 4096  # neighbouring reads this close become one, the gap going to a junk buffer
VECTORS = 500  # buffers of one read, junk ones not counted: below the 1024 the system takes
TILE = 128
OPEN_SOURCES = 64  # per reader: a tree of chunk files has more than a process may hold open
SCRATCH = 1 << 20


class Move(NamedTuple):
    """One strided box of bytes, from a source (None: a constant, whose bits are `offset`) to a destination.

    Strides are in bytes. Destination axes are nested (an outer stride spans all inner ones), so any byte range of the
    destination is a few boxes. `item` and `out_item` are 1 where the last axis is a plain run of bytes (or of
    elements of one byte).
    """

    source: Source | None
    offset: int
    shape: Shape
    strides: Shape
    out: int
    out_strides: Shape
    item: int
    out_item: int
    fns: tuple[ValueFn, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of source values it takes (a repeated value counts each time)."""
        return math.prod(self.shape) * self.item

    @property
    def span(self) -> int:
        """Bytes of the file from the first one it needs to the last."""
        return self.item + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def run(self) -> tuple[int, list[int]]:
        """The longest contiguous source run, and the axes that form it."""
        run, axes = self.item, []
        real = [i for i, s in enumerate(self.strides) if s and self.shape[i] > 1]
        for i in sorted(real, key=self.strides.__getitem__):
            if self.strides[i] != run:
                break
            run *= self.shape[i]
            axes.append(i)
        return run, axes

    @property
    def is_runs(self) -> bool:
        """Whether the last axis is a plain run of bytes; elements of one byte that lie apart are none."""
        return self.item == 1 == self.strides[-1] == self.out_strides[-1]

    @property
    def cost(self) -> int:
        """What reading it moves, the cheaper of: the covering span, or run by run."""
        n = self.nbytes
        return min(self.span, n + n // self.run[0] * SEEK)

    def at(self, axis: int, i: int, n: int) -> Move:
        """Entries i..i+n of one axis."""
        return self._replace(
            offset=self.offset + i * self.strides[axis] if self.source else self.offset,
            out=self.out + i * self.out_strides[axis],
            shape=(*self.shape[:axis], n, *self.shape[axis + 1 :]),
        )

    def inner(self, i: int) -> Move:
        """Entry i of the first axis, without that axis."""
        one = self.at(0, i, 1)
        return one._replace(shape=one.shape[1:], strides=one.strides[1:], out_strides=one.out_strides[1:])


def make(
    source: Source | None,
    offset: int,
    shape: Shape,
    strides: Shape,
    out: int,
    out_strides: Shape,
    item: int,
    out_item: int,
    fns: tuple[ValueFn, ...],
) -> Move:
    """A Move in normal form: no axis of size 1, axes contiguous on both sides merged, a contiguous last one as bytes."""
    if not fns and source is not None and strides and strides == out_strides:
        nbytes = item * math.prod(shape)
        if strides[0] * shape[0] == nbytes:  # nested and without gaps: the common case, and the fastest
            return Move(source, offset, (nbytes,), (1,), out, (1,), 1, 1, ())
    axes: list[tuple[int, int, int]] = []
    for n, a, b in zip(shape, strides, out_strides, strict=True):
        if n == 1:
            continue
        if axes and axes[-1][1] == n * a and axes[-1][2] == n * b:
            axes[-1] = (axes[-1][0] * n, a, b)
        else:
            axes.append((n, a, b))
    if not fns and source is not None and (not axes or axes[-1][1] == axes[-1][2] == item):
        n = axes.pop()[0] if axes else 1
        axes.append((n * item, 1, 1))
        item = out_item = 1
    sizes, ins, outs = zip(*(axes or [(1, item, out_item)]), strict=True)
    return Move(source, offset, sizes, ins, out, outs, item, out_item, fns)


def clip(move: Move, lo: int, hi: int) -> list[Move]:
    """The parts whose destination lies in [lo, hi): at most a head, a body and a tail per axis.

    `lo` and `hi` never cut through an element (a plain byte run has none, it may be cut anywhere).
    """
    n, stride, start = move.shape[0], move.out_strides[0], move.out
    extent = move.out_item + sum((k - 1) * s for k, s in zip(move.shape[1:], move.out_strides[1:], strict=True))
    if lo <= start and start + (n - 1) * stride + extent <= hi:
        return [move]
    first = max(0, -((start - lo) // stride)) if lo > start else 0  # the first entry that begins at or after lo
    end = min(n, (hi - extent - start) // stride + 1) if hi > start else 0  # one past the last entry that ends by hi
    deep = len(move.shape) > 1
    parts: list[Move] = []
    if deep and 0 < first <= n and start + (first - 1) * stride + extent > lo:
        parts += clip(move.inner(first - 1), lo, hi)
    if end > first:
        parts.append(move.at(0, first, end - first))
    tail = max(first, end)
    if deep and tail < n and start + tail * stride < hi:
        parts += clip(move.inner(tail), lo, hi)
    return parts


def clipped(moves: Sequence[Move], lo: int, hi: int) -> list[Move]:
    return [part for move in moves for part in clip(move, lo, hi)]


class Span(NamedTuple):
    """Bytes start..stop of a file."""

    origin: Origin
    start: int
    stop: int

    def covers(self, other: Span) -> bool:
        return self.origin == other.origin and self.start <= other.start and other.stop <= self.stop


NOWHERE = Span(Origin(""), 0, 0)


# A read straight into the destination: path, coding, offset, place in the buffer, bytes. A bare tuple: thousands are sorted
_Run = tuple[str, str, int, int, int]


class Reader:
    """Carries out moves. One per thread: open sources, a scratch buffer, the span now in it, which siblings share."""

    def __init__(self, scratch: int = SCRATCH, opener: Callable[[str], Opened] = LocalFile) -> None:
        self._opener = opener
        self._open: OrderedDict[Origin, Opened] = OrderedDict()
        self._junk = memoryview(bytearray(GAP))
        self._chain = Chain()
        self._resize(scratch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    @property
    def capacity(self) -> int:
        return len(self._scratch)

    def grow(self, nbytes: int) -> None:
        """Make the scratch buffer at least this large."""
        if nbytes > len(self._scratch):
            self._resize(nbytes)

    def fill(self, moves: Sequence[Move], out: Bytes, to: int, window: Span | None = None) -> Loss:
        """Write the bytes `to`..`to + len(out)` of the destination into `out`; returns what value functions lost.

        `window` is a span that siblings will ask for parts of: it is read whole, once, if it is needed at all.
        """
        return self.carry_out(clipped(moves, to, to + len(out)), out, to, window)

    def carry_out(self, moves: Iterable[Move], out: Bytes, to: int, window: Span | None = None) -> Loss:
        """The same, of moves whose destinations all lie within `out`: nothing is cut, and nothing checks it."""
        loss = NO_LOSS
        runs: list[_Run] = []
        for move in moves:
            if move.source is None:
                loss = loss.plus(self._put(move, out, 0, out, to))
            elif move.fns or not move.is_runs or (len(move.shape) > 1 and move.shape[-1] < RUN):
                loss = loss.plus(self._gather(move, out, to, window))
            elif len(move.shape) == 1:  # most: a call for each would take longer than to look
                runs.append((move.source.path, move.source.coding, move.offset, move.out - to, move.shape[0]))
            else:
                runs += _straight_runs(move, move.source, to)
        self._read_runs(runs, out.data)
        return loss

    def _resize(self, nbytes: int) -> None:
        self._scratch: Bytes = np.empty(nbytes, np.uint8)
        self._memory = self._scratch.data
        self._held = NOWHERE

    def _read(self, origin: Origin, buffers: list[memoryview], offset: int, want: int) -> None:
        """Fill the buffers, however many reads that takes."""
        source = self._source(origin)
        while True:
            try:
                n = source.read_into(offset, buffers)
            except OSError as error:
                error.filename = origin.path
                raise
            if n >= want:
                return
            if n == 0:
                raise FormatError(
                    origin.path, f"nothing at byte {offset}, {want} more are expected there; is the file truncated?"
                )
            offset, want = offset + n, want - n
            while n >= len(buffers[0]):
                n -= len(buffers[0])
                buffers = buffers[1:]
            buffers = [buffers[0][n:], *buffers[1:]]

    def _source(self, origin: Origin) -> Opened:
        found = self._open.get(origin)
        if found is not None:
            self._open.move_to_end(origin)
            return found
        if len(self._open) >= OPEN_SOURCES:
            self._open.popitem(last=False)[1].close()
        if origin.coding:  # each holds what it decoded in memory: there is one at a time
            for other in [o for o in self._open if o.coding]:
                self._open.pop(other).close()
        self._open[origin] = found = opened(origin, self._opener)
        return found

    def _read_runs(self, runs: list[_Run], out: memoryview) -> None:
        """Runs in file order; neighbours become one read."""
        runs.sort()
        k, origin = 0, NOWHERE.origin
        while k < len(runs):
            path, coding, start, at, n = runs[k]
            buffers, end, k = [out[at : at + n]], start + n, k + 1
            while k < len(runs) and len(buffers) < VECTORS:
                other, its_coding, offset, at, n = runs[k]
                if not 0 <= offset - end <= GAP or other != path or its_coding != coding:
                    break
                if offset > end:
                    buffers.append(self._junk[: offset - end])
                buffers.append(out[at : at + n])
                end, k = offset + n, k + 1
            if (path, coding) != origin:
                origin = Origin(path, coding)
            self._read(origin, buffers, start, end - start)

    def _gather(self, move: Move, out: Bytes, to: int, window: Span | None) -> Loss:
        """Covering span into scratch, then one strided copy; a span already held (by a sibling) is not read again."""
        whole = _span(move)
        shared = self._held.covers(whole) or (window is not None and window.covers(whole))
        if not shared and move.cost < move.span:
            return self._sparse(move, out, to)
        loss = NO_LOSS
        for part in _split(move, len(self._scratch)):
            want = _span(part)
            if not self._held.covers(want):
                load = window if window is not None and window.covers(want) else want
                self._held = NOWHERE  # should the read fail, nothing is held
                size = load.stop - load.start
                self._read(load.origin, [self._memory[:size]], load.start, size)
                self._held = load
            loss = loss.plus(self._put(part, self._scratch, self._held.start, out, to))
        return loss

    def _sparse(self, move: Move, out: Bytes, to: int) -> Loss:
        """One read per source run, packed into scratch, then one strided copy: for boxes thin in a wide span."""
        run, run_axes = move.run
        outer = [i for i, s in enumerate(move.strides) if s and move.shape[i] > 1 and i not in run_axes]
        if not outer:
            return self._gather(move, out, to, None)
        outer.sort(key=move.strides.__getitem__)
        widest = outer[-1]
        slab = run * math.prod(move.shape[i] for i in outer[:-1])  # packed bytes of one entry of the widest axis
        fits = slab <= len(self._scratch)
        loss, step = NO_LOSS, len(self._scratch) // slab if fits else 1
        for i in range(0, move.shape[widest], step):
            part = move.at(widest, i, min(step, move.shape[widest] - i))
            loss = loss.plus(self._packed(part, run, outer, out, to) if fits else self._sparse(part, out, to))
        return loss

    def _packed(self, move: Move, run: int, outer: Sequence[int], out: Bytes, to: int) -> Loss:
        """`_sparse` for a box whose packed runs fit into scratch."""
        assert move.source is not None
        self._held = NOWHERE
        strides, packed = list(move.strides), run
        for i in outer:
            strides[i] = packed
            packed *= move.shape[i]
        at = 0
        order = outer[::-1]
        for index in product(*(range(move.shape[i]) for i in order)):
            offset = move.offset + sum(k * move.strides[i] for k, i in zip(index, order, strict=True))
            self._read(move.source.origin, [self._memory[at : at + run]], offset, run)
            at += run
        return self._put(move._replace(offset=0, strides=tuple(strides)), self._scratch, 0, out, to)

    def _put(self, move: Move, src: Bytes, at: int, out: Bytes, to: int) -> Loss:
        """`src` holds the file from byte `at`, `out` the destination from byte `to`: copy through the functions."""
        fns, place = move.fns, move.out - to
        if not fns:
            kind = UINT[move.out_item]
            dst = np.ndarray(move.shape, kind, out, place, move.out_strides)
            if move.source is None:
                dst[...] = move.offset
            else:
                _copy(np.ndarray(move.shape, kind, src, move.offset - at, move.strides), dst)
            return NO_LOSS
        dst = np.ndarray(move.shape, fns[-1].target.numpy, out, place, move.out_strides)
        if move.source is None:
            value, loss = constant(move.offset, fns)
            dst[...] = value
            return NO_LOSS.plus(loss, math.prod(move.shape))
        return self._chain(fns, np.ndarray(move.shape, fns[0].source.numpy, src, move.offset - at, move.strides), dst)


def _span(move: Move) -> Span:
    assert move.source is not None
    return Span(move.source.origin, move.offset, move.offset + move.span)


def _straight_runs(move: Move, source: Source, to: int) -> list[_Run]:
    """The byte runs of a move of several axes, the last one a run."""
    path, coding, at, n = source.path, source.coding, move.out - to, move.shape[-1]
    return [
        (path, coding, move.offset + _along(index, move.strides), at + _along(index, move.out_strides), n)
        for index in product(*map(range, move.shape[:-1]))
    ]


def _along(index: Shape, strides: Shape) -> int:
    return sum(i * s for i, s in zip(index, strides, strict=False))


def _split(move: Move, limit: int) -> Iterator[Move]:
    """Cut along the widest source stride until each part spans at most `limit` bytes."""
    if move.span <= limit:
        yield move
        return
    axis = max(range(len(move.shape)), key=lambda i: move.strides[i] * (move.shape[i] > 1))
    one = move.span - (move.shape[axis] - 1) * move.strides[axis]
    step = (limit - one) // move.strides[axis] + 1 if one <= limit else 1
    for i in range(0, move.shape[axis], step):
        yield from _split(move.at(axis, i, min(step, move.shape[axis] - i)), limit)


def _copy(src: Array, dst: Array) -> None:
    """A strided copy; a transpose goes tile by tile (numpy alone takes five times as long)."""
    if dst.ndim != 2 or src.strides[1] <= src.strides[0] or min(dst.shape) <= TILE // 4:
        np.copyto(dst, src)
        return
    for i, j in product(range(0, dst.shape[0], TILE), range(0, dst.shape[1], TILE)):
        dst[i : i + TILE, j : j + TILE] = src[i : i + TILE, j : j + TILE]
