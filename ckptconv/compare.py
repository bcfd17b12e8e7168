"""Comparing two checkpoints in canonical form, whatever their formats and layouts, chunk by chunk in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ckptconv.checkpoint import Checkpoint, Key
from ckptconv.dtypes import FP32
from ckptconv.executor.execute import Progress
from ckptconv.moves import Move, Reader
from ckptconv.pipeline import Job, open_checkpoint
from ckptconv.tensor import Tensor
from ckptconv.values import Cast

CHUNK = 1 << 20
KINDS = ("values", "dtype", "shape", "missing", "padding", "tie", "replica", "state")


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which two checkpoints are not the same. `kind` is one of KINDS."""

    kind: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Every difference found, how much was compared, and what was not."""

    differences: tuple[Difference, ...]
    tensors: int
    nbytes: int
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return not self.differences


def verify(a: Job | str | Path, b: Job | str | Path, progress: Progress | None = None) -> Verdict:
    """Compare two checkpoints; raises when one of them cannot be read whole. Training state is compared where both have it."""
    jobs = [x if isinstance(x, Job) else Job(Path(x)) for x in (a, b)]
    left, right = (open_checkpoint(job, training=job.optimizer == "keep")[1] for job in jobs)
    if progress is None:
        return compare(left, right)
    shared = left.tensors.keys() & right.tensors.keys()
    progress.start(
        sum(min(left.tensors[key].nbytes, right.tensors[key].nbytes) for key in shared)
        + sum(r.kept.nbytes for r in (*left.replicas, *right.replicas))
    )
    try:
        return compare(left, right, progress.advance)
    finally:
        progress.done()


def compare(left: Checkpoint, right: Checkpoint, advance: Callable[[int], None] = lambda _: None) -> Verdict:
    """Every difference between two canonical graphs; `advance` is told how many bytes of A were compared."""
    left, right, notes = _alike_in_state(left, right)
    differences = list(_of_state(left, right))
    nbytes = 0
    with Reader() as one, Reader() as two:
        differ = _Differ(one, two, advance)
        for side, checkpoint in (("A", left), ("B", right)):
            for r in checkpoint.replicas:
                found = differ.values(r.name, r.kept, r.copy)
                differences += [replace(d, kind="replica", detail=f"{side}: {r.where}: {d.detail}") for d in found]
        if left.config.tied != right.config.tied:
            differences.append(Difference("tie", "head.weight", f"tied in {'A' if left.config.tied else 'B'} only"))
            left, right = _with_head(left), _with_head(right)
        rows = _true_rows(left, right)
        keys = sorted({*left.tensors, *right.tensors})
        for key in keys:
            x, y = left.tensors.get(key), right.tensors.get(key)
            if x is None or y is None:
                differences.append(Difference("missing", str(key), f"only in {'B' if x is None else 'A'}"))
                continue
            nbytes += x.nbytes
            differences += differ.padded(key, x, y, rows) if key.name in _VOCABULARY else differ.tensors(str(key), x, y)
    return Verdict(tuple(differences), len(keys), nbytes, notes)


_VOCABULARY = ("embed.weight", "head.weight")


def _alike_in_state(left: Checkpoint, right: Checkpoint) -> tuple[Checkpoint, Checkpoint, tuple[str, ...]]:
    """Both with their optimizer's slots, or neither: many formats have no place for them."""
    if (left.extras.training is None) == (right.extras.training is None):
        return left, right, ()
    side = "A" if right.extras.training is None else "B"
    note = f"optimizer state: only {side} has it, so the weights alone are compared"
    return _weights(left), _weights(right), (note,)


def _weights(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, tensors={key: t for key, t in checkpoint.tensors.items() if key.slot == "param"})


def _of_state(left: Checkpoint, right: Checkpoint) -> Iterator[Difference]:
    """What training needs beside tensors; generators belong to processes, and are not compared."""
    a, b = left.extras.training, right.extras.training
    if a is None or b is None:
        return
    for name in ("updates", "groups", "scheduler", "grad_scaler"):
        if (x := getattr(a, name)) != (y := getattr(b, name)):
            yield Difference("state", name, f"A has {str(x)[:200]}, B has {str(y)[:200]}")


def _with_head(checkpoint: Checkpoint) -> Checkpoint:
    """A tied model with its embedding told as its head too."""
    if not checkpoint.config.tied:
        return checkpoint
    head = {Key("head.weight", key.slot): t for key, t in checkpoint.tensors.items() if key.name == "embed.weight"}
    return replace(checkpoint, tensors={**checkpoint.tensors, **head})


def _true_rows(a: Checkpoint, b: Checkpoint) -> int | None:
    """The true vocabulary, as far as either side knows it; None when neither does, or they disagree."""
    known = {c.config.vocab for c in (a, b)} - {None}
    return known.pop() if len(known) == 1 else None


class _Differ:
    """Compares tensors piece by piece with two readers and two reused buffers."""

    def __init__(self, one: Reader, two: Reader, advance: Callable[[int], None]) -> None:
        self.readers = one, two
        self.advance = advance
        self.buffers = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)

    def padded(self, key: Key, x: Tensor, y: Tensor, rows: int | None) -> Iterator[Difference]:
        """Tensors with vocabulary rows: the true rows, then the padding if both have the same amount of it."""
        name = str(key)
        if rows is None or rows > min(x.shape[0], y.shape[0]):
            if x.shape != y.shape:
                yield Difference(
                    "padding",
                    name,
                    f"{x.shape[0]} and {y.shape[0]} rows, and the true vocabulary is not agreed: give --vocab-size",
                )
                return
            rows = x.shape[0]
        yield from self.tensors(name, x.narrow(0, 0, rows), y.narrow(0, 0, rows))
        if x.shape == y.shape and x.dtype == y.dtype and x.shape[0] > rows:
            found = self.values(name, x.narrow(0, rows, x.shape[0]), y.narrow(0, rows, y.shape[0]))
            yield from (replace(d, kind="padding") for d in found)

    def tensors(self, name: str, x: Tensor, y: Tensor) -> Iterator[Difference]:
        if x.shape != y.shape:
            yield Difference("shape", name, f"{x.shape} and {y.shape}")
            return
        if x.dtype != y.dtype:
            yield Difference("dtype", name, f"{x.dtype} and {y.dtype}")
            if not (x.dtype.is_float and y.dtype.is_float):
                return
            x, y = _widened(x), _widened(y)
        yield from self.values(name, x, y)

    def values(self, name: str, x: Tensor, y: Tensor) -> list[Difference]:
        """Bit for bit; tells the first index that differs and how many do."""
        moves = x.lower(), y.lower()
        first, count = -1, 0
        for lo in range(0, x.nbytes, CHUNK):
            hi = min(lo + CHUNK, x.nbytes)
            a, b = (self._read(side, moves[side], lo, hi) for side in (0, 1))
            self.advance(hi - lo)
            if a.tobytes() == b.tobytes():
                continue
            item = x.dtype.itemsize
            unequal = np.flatnonzero((a.reshape(-1, item) != b.reshape(-1, item)).any(axis=1))
            if first < 0:
                first = lo // item + int(unequal[0])
            count += len(unequal)
        if not count:
            return []
        index = tuple(int(i) for i in np.unravel_index(first, x.shape)) if x.shape else ()
        return [
            Difference("values", name, f"{count} of {x.nbytes // x.dtype.itemsize} differ, the first at {list(index)}")
        ]

    def _read(self, side: int, moves: list[Move], lo: int, hi: int) -> NDArray[np.uint8]:
        buffer = self.buffers[side][: hi - lo]
        self.readers[side].fill(moves, buffer, lo)
        return buffer


def _widened(tensor: Tensor) -> Tensor:
    """As fp32, to tell whether values agree where dtypes do not."""
    return tensor if tensor.dtype == FP32 else tensor.map(Cast(tensor.dtype, FP32), FP32)
