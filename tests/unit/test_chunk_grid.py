"""Grids told from boxes."""

from __future__ import annotations

import random
from itertools import product

import pytest

from ckptconv.assemble import Box
from ckptconv.containers.chunk_grid import Grid, grid
from ckptconv.tensor import Shape


def boxes_of(shape: Shape, cuts: list[list[int]]) -> list[Box]:
    """Every combination of intervals between cuts, in no order."""
    axes = [
        list(zip([0, *inner], [*inner, n], strict=True)) for n, inner in zip(shape, cuts, strict=True)
    ]  # an interval for each part
    boxes: list[Box] = list(product(*axes))
    random.Random(0).shuffle(boxes)
    return boxes


@pytest.mark.parametrize(
    ("shape", "cuts", "counts", "chunk"),
    [
        ((4, 192, 64), [[1, 2, 3], [96], []], (4, 2, 1), (1, 96, 64)),
        ((61, 32), [[31], []], (2, 1), (31, 32)),
        ((5,), [[2, 4]], (3,), (2,)),
        ((7,), [[]], (1,), (7,)),
        ((), [], (), ()),
    ],
)
def test_equal_chunks_are_a_grid(shape: Shape, cuts: list[list[int]], counts: Shape, chunk: Shape) -> None:
    boxes = boxes_of(shape, cuts)
    assert grid(shape, boxes) == Grid(counts, chunk, len(boxes))


def test_why_others_are_none() -> None:
    uneven = grid((10, 4), boxes_of((10, 4), [[3, 4], [2]]))
    assert (uneven.counts, uneven.boxes, uneven.why) == (None, 6, "axis 0 is cut in 3, 1, 6")
    growing = grid((5,), [((0, 2),), ((2, 5),)])
    assert growing.why == "axis 0 is cut in 2, 3"
    many = grid((20,), boxes_of((20,), [[1, 3, *range(4, 20)]]))
    assert many.why == "axis 0 is cut in 1, 2, 1, 1, 1, 1, 1, 1, …"
    bricks: list[Box] = [((0, 2), (0, 1)), ((0, 2), (1, 4)), ((2, 4), (0, 3)), ((2, 4), (3, 4))]
    assert grid((4, 4), bricks) == Grid(None, None, 4, "they form no grid")
    assert grid((0, 4), []).boxes == 0
