"""The only way parts become a whole: ranks of a layout, chunks of a grid, shards of a file."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from ckptconv.nodes import concat
from ckptconv.tensor import Shape, Tensor

Box = tuple[tuple[int, int], ...]
Part = tuple[Shape, Tensor]


def assemble(shape: Shape, parts: Sequence[Part]) -> Tensor:
    """Parts at offsets as one tensor of `shape`; they must cover it exactly once. ValueError says how they do not."""
    if len(parts) == 1 and parts[0][1].shape == shape and not any(parts[0][0]):
        return parts[0][1]
    items = [(tuple((o, o + n) for o, n in zip(at, t.shape, strict=True)), t) for at, t in parts if 0 not in t.shape]
    for box, _ in items:
        if any(lo < 0 or hi > n for (lo, hi), n in zip(box, shape, strict=True)):
            raise ValueError(f"a part at {_text(box)} lies outside shape {shape}")
    if 0 in shape:
        return parts[0][1]
    covered, wanted = sum(math.prod(t.shape) for _, t in items), math.prod(shape)
    if covered != wanted:
        raise ValueError(f"parts cover {covered} of {wanted} elements of shape {shape}")
    return _joined(tuple((0, n) for n in shape), items)


def _joined(box: Box, items: Sequence[tuple[Box, Tensor]]) -> Tensor:
    """Cut along an axis where no part straddles the cut, and join the halves; recurse."""
    if len(items) == 1:
        if items[0][0] != box:
            raise ValueError(
                f"a part at {_text(items[0][0])} stands where {_text(box)} is needed: parts overlap and leave a hole"
            )
        return items[0][1]
    for axis, (start, stop) in enumerate(box):
        edges = [start, *_straight_cuts([b[axis] for b, _ in items], start), stop]
        if len(edges) == 2:
            continue
        slabs, ordered, at = [], sorted(items, key=lambda item: item[0][axis]), 0
        for lo, hi in pairwise(edges):
            end = bisect_left(ordered, hi, at, key=lambda item: item[0][axis][0])
            if end == at:
                raise ValueError(f"nothing covers {lo}..{hi} of axis {axis}")
            slabs.append(_joined((*box[:axis], (lo, hi), *box[axis + 1 :]), ordered[at:end]))
            at = end
        return concat(slabs, axis)
    raise ValueError("no straight cut separates the parts: they overlap, or tile in a way no framework writes")


def _straight_cuts(intervals: Sequence[tuple[int, int]], start: int) -> list[int]:
    cuts, end = [], start
    for lo, hi in sorted(set(intervals)):
        if lo >= end and lo > start:
            cuts.append(lo)
        end = max(end, hi)
    return cuts


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{lo}:{hi}" for lo, hi in box) + "]"
