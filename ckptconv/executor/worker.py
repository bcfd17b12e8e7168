"""What a thread does with a unit (read, hash, write, in chunks), and the ledger in which threads say what is done."""

from __future__ import annotations

import struct
from collections import deque
from threading import Condition
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from ckptconv.executor.crc import crc32
from ckptconv.executor.journal import Proof
from ckptconv.executor.outputs import Outputs
from ckptconv.executor.units import CHECKS, CHUNK, PIECE, Batch, Claim, Compare, Group, Unit
from ckptconv.moves import Bytes, Move, Reader, Span, clipped
from ckptconv.plan import Check, Late, Plan, Segment
from ckptconv.tensor import Tensor
from ckptconv.values import NO_LOSS, Loss

BARRIER = 64 << 20  # bytes written between two journal entries; what a crash may cost
SIBLING_STEP = 256 << 10  # of each sibling: shorter ones stay in the cache, but cost more than that gains
START = 1 << 20  # bytes of scratch and of buffer that every worker has
_PAGE = 4096


class Progress(Protocol):
    """Told how far a run is; called by one thread at a time."""

    def start(self, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def done(self) -> None: ...


class Ledger:
    """What threads share besides the files: the queue, what was finished since the last barrier, what went wrong."""

    def __init__(self, work: list[Unit], proofs: dict[Claim, Proof], progress: Progress | None) -> None:
        self.queue = deque(work)
        self.proofs = proofs
        self.changed = Condition()
        self.errors: list[BaseException] = []
        self.unequal: list[tuple[int, str]] = []  # (check, what differs): more are looked for, nothing more is written
        self.covered: set[tuple[int, int]] = set()  # (file, segment) of headers and padding that went with a batch
        self.over = False
        self._progress = progress
        self._fresh: list[tuple[Claim, Proof]] = []
        self._dirty: set[int] = set()
        self._since = 0

    def next(self) -> Unit | None:
        """A unit to do; None when all are handed out, or the run is lost."""
        while not self.errors:
            try:
                unit = self.queue.popleft()
            except IndexError:
                return None
            if not self.unequal or isinstance(unit, Compare):
                return unit
        return None

    def advance(self, nbytes: int) -> None:
        if self._progress is not None:
            with self.changed:
                self._progress.advance(nbytes)

    def finished(
        self, claims: list[tuple[Claim, Proof]], nbytes: int, plain: list[tuple[int, int]] | None = None
    ) -> None:
        """Pieces whose bytes are handed to the system, if not yet durable; `plain`: segments that are no tensors."""
        with self.changed:
            self._fresh += claims
            self.proofs.update(claims)
            self.covered.update(plain or ())
            self._dirty.update(claim.file for claim, _ in claims if claim.file != CHECKS)
            self._since += nbytes
            if self._since >= BARRIER:
                self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.errors.append(error)

    def await_barrier(self) -> bool:
        """Wait until it is time for a barrier; False when the work is over."""
        with self.changed:
            while self._since < BARRIER and not self.over:
                self.changed.wait()
            return not self.over

    def end(self) -> None:
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def take(self) -> tuple[list[tuple[Claim, Proof]], set[int]]:
        """What was finished since it was last taken, and the files that holds."""
        with self.changed:
            fresh, dirty = self._fresh, self._dirty
            self._fresh, self._dirty, self._since = [], set(), 0
        return fresh, dirty


class Member:
    """A tensor of a group while its piece is being written."""

    __slots__ = ("base", "claim", "crc", "digest", "file", "loss", "moves", "summed")

    def __init__(self, file: int, index: int, segment: Segment, unit: Group, summed: bool) -> None:
        self.file, self.base = file, segment.offset
        self.claim = Claim(file, index, unit.lo // PIECE)
        self.moves = clipped(_tensor(segment).lower(), unit.lo, unit.hi)
        self.summed, self.crc, self.digest, self.loss = summed, 0, xxhash.xxh3_128(), NO_LOSS

    def finished(self) -> tuple[Claim, Proof]:
        return self.claim, Proof(self.digest.digest(), self.crc, self.loss)


class Way(NamedTuple):
    """How a group is gone through: bytes at a time, and whether sources are read for all members at once."""

    step: int
    shared: bool


class Worker:
    """One thread's buffers; `most` bounds each of the two."""

    def __init__(self, plan: Plan, outputs: Outputs, ledger: Ledger, most: int) -> None:
        self._plan, self._outputs, self._ledger = plan, outputs, ledger
        self._most = most // _PAGE * _PAGE
        self._buffer: Bytes = np.empty(START, np.uint8)
        self._summed = [any(isinstance(s.body, Late) for s in f.segments) for f in plan.files]

    def run(self) -> None:
        """Do units until none is left or one fails."""
        try:
            with Reader(START) as self._reader:
                while (unit := self._ledger.next()) is not None:
                    if isinstance(unit, Batch):
                        self._batch(unit)
                    elif isinstance(unit, Group):
                        self._group(unit)
                    else:
                        self._compare(unit)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that started this one
            self._ledger.fail(error)

    def _grow(self, nbytes: int) -> None:
        if nbytes > len(self._buffer):
            self._buffer = np.empty(nbytes, np.uint8)

    def _batch(self, unit: Batch) -> None:
        segments = self._plan.files[unit.file].segments
        self._grow(unit.hi - unit.lo)
        out = self._buffer[: unit.hi - unit.lo]
        losses = self._fill_batch(unit, segments, out)
        claims, plain, crcs, memory = [], [], {}, out.data
        for s in unit.segments:
            body, at = segments[s].body, segments[s].offset - unit.lo
            if not isinstance(body, Tensor):
                plain.append(s)
            if isinstance(body, Late):
                continue
            data = memory[at : at + segments[s].nbytes]
            if self._summed[unit.file]:
                crcs[s] = crc32(data, 0)
            if isinstance(body, Tensor):
                digest = xxhash.xxh3_128_digest(data)
                claims.append((Claim(unit.file, s, 0), Proof(digest, crcs.get(s, 0), losses.get(s, NO_LOSS))))
        for s in plain:
            body = segments[s].body
            if isinstance(body, Late):
                for position, of in body.crcs:
                    struct.pack_into("<I", memory, segments[s].offset - unit.lo + position, crcs[of])
        self._outputs.write_at(unit.file, memory, unit.lo)
        self._ledger.finished(claims, len(out), [(unit.file, s) for s in plain])
        self._ledger.advance(len(out))

    def _fill_batch(self, unit: Batch, segments: tuple[Segment, ...], out: Bytes) -> dict[int, Loss]:
        """All tensors in as few reads as can be; those with value functions one by one, to know what each loses."""
        moves: list[Move] = []
        losses, memory = {}, out.data
        for s in unit.segments:
            body, at = segments[s].body, segments[s].offset - unit.lo
            if isinstance(body, Tensor):
                lowered = body.lower(at)
                if any(move.fns for move in lowered):
                    losses[s] = self._reader.carry_out(lowered, out, 0)
                else:
                    moves += lowered
            else:
                data = body.template if isinstance(body, Late) else body
                memory[at : at + len(data)] = data
        self._reader.carry_out(moves, out, 0)
        return losses

    def _group(self, unit: Group) -> None:
        files = self._plan.files
        members = [Member(f, s, files[f].segments[s], unit, self._summed[f]) for f, s in unit.members]
        way = self._way(unit, members)
        lo = unit.lo
        while lo < unit.hi:
            hi = min(unit.hi, lo - lo % way.step + way.step)
            cuts = [clipped(member.moves, lo, hi) for member in members]
            window = self._window(cuts) if way.shared else None
            out = self._buffer[: hi - lo]
            for member, cut in zip(members, cuts, strict=True):
                member.loss = member.loss.plus(self._reader.carry_out(cut, out, lo, window))
                member.digest.update(out.data)
                if member.summed:
                    member.crc = crc32(out, member.crc)
                self._outputs.write_at(member.file, out.data, member.base + lo)
            self._ledger.advance(len(members) * (hi - lo))
            lo = hi
        self._ledger.finished([member.finished() for member in members], len(members) * (unit.hi - unit.lo))

    def _way(self, unit: Group, members: list[Member]) -> Way:
        """The step that reads best: a chunk of what lies together, a whole piece of a transpose, less for siblings."""
        tensor = _tensor(self._plan.files[members[0].file].segments[members[0].claim.segment])
        row = tensor.dtype.itemsize * (tensor.shape[-1] if tensor.shape else 1)
        n, moves = len(members), members[0].moves
        step = max(SIBLING_STEP, CHUNK // n) // _PAGE * _PAGE
        if n > 1:
            self._reader.grow(min(n * (step + 2 * row), PIECE, self._most))
            step = max(_PAGE, min(step, self._reader.capacity // n - 2 * row) // _PAGE * _PAGE)
        elif 2 * _cost(moves, unit.lo, unit.hi) < _cost(moves, unit.lo, min(unit.hi, unit.lo + step)):
            step = min(PIECE, self._most)  # long runs of the source are worth more than staying in the cache
        self._grow(min(step, unit.hi - unit.lo))
        if row < step:
            step -= step % row
        return Way(step, n > 1)

    def _window(self, cuts: list[list[Move]]) -> Span | None:
        """The span of the one source that covers what all members need now, if it fits."""
        needed = [move for cut in cuts for move in cut if move.source is not None]
        origins = {move.source.origin for move in needed if move.source is not None}
        if len(origins) != 1:
            return None
        start, stop = min(move.offset for move in needed), max(move.offset + move.span for move in needed)
        return Span(origins.pop(), start, stop) if stop - start <= self._reader.capacity else None

    def _compare(self, unit: Compare) -> None:
        check = self._plan.checks[unit.check]
        half = min(len(self._buffer) // 2, CHUNK)
        kept, copy = clipped(check.kept.lower(), unit.lo, unit.hi), clipped(check.copy.lower(), unit.lo, unit.hi)
        for lo in range(unit.lo, unit.hi, half):
            hi = min(unit.hi, lo + half)
            a, b = self._buffer[: hi - lo], self._buffer[half : half + hi - lo]
            self._reader.fill(kept, a, lo)
            self._reader.fill(copy, b, lo)
            if not np.array_equal(a, b):
                self._ledger.unequal.append((unit.check, _first_difference(check, a, b, lo)))
                return
            self._ledger.advance(hi - lo)
        self._ledger.finished([(Claim(CHECKS, unit.check, unit.lo // PIECE), Proof(bytes(16), 0))], 0)


def _tensor(segment: Segment) -> Tensor:
    assert isinstance(segment.body, Tensor)
    return segment.body


def _cost(moves: list[Move], lo: int, hi: int) -> float:
    """Bytes the reads move for each byte wanted."""
    return sum(part.cost for part in clipped(moves, lo, hi) if part.source is not None) / (hi - lo)


def _first_difference(check: Check, kept: Bytes, copy: Bytes, lo: int) -> str:
    kind = check.kept.dtype.numpy
    at = int(np.flatnonzero(kept != copy)[0]) // kind.itemsize
    index = tuple(int(i) for i in np.unravel_index(lo // kind.itemsize + at, check.kept.shape or (1,)))
    a, b = kept.view(kind)[at], copy.view(kind)[at]
    same = " (unlike bits of one value)" if str(a) == str(b) else ""
    return f"first at {list(index)}: {a} is kept, {b} found{same}"
