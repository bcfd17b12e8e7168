"""Whether boxes tile a shape: each element covered exactly once. Quick for the hundred thousand boxes of a large model.

It accepts what `assemble` can put together: boxes that straight cuts take apart, which is all that frameworks write.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise, product

from ckptconv.assemble import Box
from ckptconv.tensor import Shape

MAX_CUTS = 32  # nested; a grid has one per axis
MAX_PAIRS = 1 << 16  # looked at for an example to put in the message


def problems(shape: Shape, boxes: Sequence[Box]) -> list[str]:
    """What keeps the boxes from tiling the shape; nothing if they do."""
    whole = tuple((0, n) for n in shape)
    boxes = sorted(boxes)
    outside = [f"the chunk {text(box)} lies outside shape {shape}" for box in boxes if not _within(box, whole)]
    if outside:
        return outside
    twice = [f"two chunks are at offset {list(a)}" for a, b in pairwise([_offset(b) for b in boxes]) if a == b]
    if twice:
        return twice
    if _is_grid(shape, boxes):
        return []
    problem = _cut(whole, [box for box in boxes if _volume(box)], 0)
    return [problem] if problem else []


def text(box: Box) -> str:
    return "[" + ", ".join(f"{lo}:{hi}" for lo, hi in box) + "]"


def _is_grid(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether sorted boxes are a regular grid: the common case, told in one pass."""
    axes = [[interval for interval, _ in groupby(sorted(b[axis] for b in boxes))] for axis in range(len(shape))]
    for n, intervals in zip(shape, axes, strict=True):
        if not intervals or intervals[0][0] != 0 or intervals[-1][1] != n:
            return False
        if any(a[1] != b[0] for a, b in pairwise(intervals)):
            return False
    return len(boxes) == math.prod(map(len, axes)) and all(map(tuple.__eq__, boxes, product(*axes)))


def _cut(box: Box, inside: list[Box], depth: int) -> str:
    """Cut along an axis where no box straddles the cut, and look at each part; what is wrong, or nothing."""
    if not _volume(box) or inside == [box]:
        return ""
    covered, wanted = sum(map(_volume, inside)), _volume(box)
    if covered < wanted and len(inside) < 2:
        return f"nothing covers {text(box)}" if not inside else f"of {text(box)} only {text(inside[0])} is there"
    for axis in range(len(box)):
        runs = _runs(inside, axis)
        if len(runs) > 1 and depth < MAX_CUTS:
            edges = [box[axis][0], *(min(b[axis][0] for b in run) for run in runs[1:]), box[axis][1]]
            for (lo, hi), run in zip(pairwise(edges), runs, strict=True):
                problem = _cut((*box[:axis], (lo, hi), *box[axis + 1 :]), run, depth + 1)
                if problem:
                    return problem
            return ""
    pair = _overlap(inside)
    if pair:
        return f"the chunks {text(pair[0])} and {text(pair[1])} overlap"
    if covered < wanted:
        return f"the chunks in {text(box)} leave a hole: they cover {covered} of {wanted} elements"
    return f"no straight cut separates the {len(inside)} chunks in {text(box)}: they tile in a way no framework writes"


def _runs(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Boxes grouped so that groups do not meet along the axis."""
    runs: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda b: b[axis]):
        lo, hi = box[axis]
        if lo >= end:
            runs.append([])
        runs[-1].append(box)
        end = max(end, hi)
    return runs


def _overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share elements, if they are soon found."""
    left = MAX_PAIRS
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            if all(lo < other_hi and other_lo < hi for (lo, hi), (other_lo, other_hi) in zip(a, b, strict=True)):
                return a, b
            left -= 1
            if not left:
                return None
    return None


def _within(box: Box, whole: Box) -> bool:
    return all(lo >= start and hi <= stop for (lo, hi), (start, stop) in zip(box, whole, strict=True))


def _volume(box: Box) -> int:
    return math.prod(hi - lo for lo, hi in box)


def _offset(box: Box) -> Shape:
    return tuple(lo for lo, _ in box)
