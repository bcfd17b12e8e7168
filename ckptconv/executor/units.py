"""How a plan's work is handed out: units are plain data, done in any order, by any process, even more than once.

A *piece* is 16 MiB of a tensor's bytes: what is hashed, journaled and handed out. A *batch* is consecutive small
segments of one file, written at once. A *group* is the same piece of sibling tensors, which cut the same rows of a
source (ranks of a row-parallel weight, replicas): their source is read once. A *compare* is a piece of two tensors
that must be equal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from ckptconv.moves import Move
from ckptconv.plan import File, Late, Plan, Segment
from ckptconv.tensor import Tensor

PIECE = 16 << 20  # part of the manifest's format, not an option
CHUNK = 512 << 10  # what is moved at once: about half of a core's L2 cache
SMALL = CHUNK // 2  # a segment up to this is part of a batch
CHECKS = -1  # stands for the file in claims about `plan.checks`

Where = tuple[str, int, int]


class Claim(NamedTuple):
    """Names a piece: of a segment of a file, or (file CHECKS) of a check."""

    file: int
    segment: int
    piece: int


class Batch(NamedTuple):
    """Segments of one file that lie at lo..hi of it."""

    where: Where
    file: int
    segments: range
    lo: int
    hi: int


class Group(NamedTuple):
    """Bytes lo..hi of every member, a (file, segment) each."""

    where: Where
    members: tuple[tuple[int, int], ...]
    lo: int
    hi: int


class Compare(NamedTuple):
    """Bytes lo..hi of both tensors of a check."""

    where: Where
    check: int
    lo: int
    hi: int


Unit = Batch | Group | Compare
Siblings = dict[tuple[int, int], list[tuple[int, int]]]


def units(plan: Plan, done: Collection[Claim] = frozenset()) -> list[Unit]:
    """What is left to do, in the order in which sources are best read; final files and bytes in no tensor are left out."""
    work: list[Unit] = []
    siblings: Siblings = {}
    starts: dict[tuple[int, int], tuple[str, int]] = {}
    for f, file in enumerate(plan.files):
        if file.final:
            continue
        for run in _runs(file):
            if len(run) > 1 or file.segments[run[0]].nbytes <= SMALL:
                work += _batch(f, file, run, done)
                continue
            body = file.segments[run[0]].body
            if isinstance(body, Tensor):
                moves = body.lower()
                key = (_likeness(moves), body.nbytes)
                siblings.setdefault(key, []).append((f, run[0]))
                starts.setdefault(key, _start(moves))
    for key, members in siblings.items():
        work += _groups(tuple(members), key[1], starts[key], done)
    for c, check in enumerate(plan.checks):
        start = _start(check.kept.lower())
        for piece, lo, hi in pieces(check.kept.nbytes):
            if Claim(CHECKS, c, piece) not in done:
                work.append(Compare((*start, piece), c, lo, hi))
    work.sort(key=lambda unit: unit.where)
    return work


def pieces(nbytes: int) -> Iterator[tuple[int, int, int]]:
    """(number, first byte, one past the last) of each piece; a tensor without bytes has one, empty."""
    for piece in range(max(1, -(-nbytes // PIECE))):
        yield piece, piece * PIECE, min(nbytes, (piece + 1) * PIECE)


def header_of(segment: Segment, index: int) -> bool:
    """Whether it is bytes that wait only for the checksum of the segment right behind (a zip record's local header)."""
    body = segment.body
    return isinstance(body, Late) and len(body.crcs) == 1 and body.crcs[0][1] == index + 1


def _runs(file: File) -> Iterator[range]:
    """The file's segments in runs: of small ones that are written at once, or a big one alone."""
    edges = [*(segment.offset for segment in file.segments), file.size]
    first = 0
    tied = False  # the run ends in a header whose record comes now
    for s, segment in enumerate(file.segments):
        header = header_of(segment, s)
        last = s + 1 if header else s
        late = isinstance(segment.body, Late) and not header
        if late or edges[last + 1] - edges[last] > SMALL or edges[s + 1] - edges[s] > SMALL:
            if first < s:
                yield range(first, s)
            yield range(s, s + 1)
            first, tied = s + 1, False
            continue
        if first < s and not tied and edges[last + 1] - edges[first] > CHUNK:
            yield range(first, s)
            first = s
        tied = header
    if first < len(file.segments):
        yield range(first, len(file.segments))


def _batch(f: int, file: File, run: range, done: Collection[Claim]) -> Iterator[Batch]:
    """One batch, if a tensor in it is not done; what holds no tensor is written when the file is finished."""
    tensors = [s for s in run if isinstance(file.segments[s].body, Tensor)]
    if tensors and (not done or any(Claim(f, s, 0) not in done for s in tensors)):
        body = file.segments[tensors[0]].body
        assert isinstance(body, Tensor)
        last = file.segments[run[-1]]
        yield Batch((*_start(body.lower()), 0), f, run, file.segments[run[0]].offset, last.offset + last.nbytes)


def _groups(
    members: tuple[tuple[int, int], ...], nbytes: int, start: tuple[str, int], done: Collection[Claim]
) -> Iterator[Group]:
    for piece, lo, hi in pieces(nbytes):
        left = tuple(m for m in members if Claim(*m, piece) not in done)
        if left:
            yield Group((*start, piece), left if len(left) < len(members) else members, lo, hi)


def _start(moves: list[Move]) -> tuple[str, int]:
    """Where in the sources its first bytes are."""
    for move in moves:
        if move.source is not None:
            return move.source.path, move.offset
    return "", 0


def _likeness(moves: list[Move]) -> int:
    """Equal for tensors that cut the same source rows. Being wrong about it would cost time, never correctness."""
    rows: list[tuple[object, ...]] = []
    for source, offset, shape, strides, out, *_ in moves:
        if source is None:
            rows.append((offset, shape, out))
        else:
            row = max(strides) or 1
            rows.append((source.path, source.offset, (offset - source.offset) // row, shape, strides, out))
    return hash(tuple(rows))
