"""How the chunks of a tensor lie, for people: a grid of equal chunks, or what there is in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

from ckptconv.assemble import Box
from ckptconv.tensor import Shape

LISTED = 8  # sizes along an axis


class Grid(NamedTuple):
    """`counts` chunks of `chunk` along the axes, the last of an axis perhaps smaller; without them `why` says what is so instead."""

    counts: Shape | None
    chunk: Shape | None
    boxes: int
    why: str = ""


def grid(shape: Shape, boxes: Sequence[Box]) -> Grid:
    """The grid that boxes make, if they make one."""
    if not boxes:
        return Grid(None, None, 0, "there is nothing in it")
    axes = [sorted({box[axis] for box in boxes}) for axis in range(len(shape))]
    straight = all(a[1] == b[0] for intervals in axes for a, b in pairwise(intervals))
    if not straight or len(boxes) != math.prod(map(len, axes)) or sorted(boxes) != list(product(*axes)):
        return Grid(None, None, len(boxes), "they form no grid")
    sizes = [[hi - lo for lo, hi in intervals] for intervals in axes]
    uneven = [axis for axis, parts in enumerate(sizes) if not _is_even(parts)]
    if uneven:
        return Grid(None, None, len(boxes), "; ".join(f"axis {axis} is cut in {_text(sizes[axis])}" for axis in uneven))
    return Grid(tuple(map(len, sizes)), tuple(parts[0] for parts in sizes), len(boxes))


def _is_even(parts: list[int]) -> bool:
    return all(size == parts[0] for size in parts[:-1]) and parts[-1] <= parts[0]


def _text(parts: list[int]) -> str:
    more = ", …" if len(parts) > LISTED else ""
    return ", ".join(map(str, parts[:LISTED])) + more
