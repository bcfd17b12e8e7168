"""What layout methods do to shapes (and to strides, which change alike)."""

from __future__ import annotations

Shape = tuple[int, ...]


def sized(shape: Shape, axis: int, n: int) -> Shape:
    """One axis of another size."""
    return (*shape[:axis], n, *shape[axis + 1 :])


def two(shape: Shape, axis: int, n: int, m: int) -> Shape:
    """One axis in two."""
    return (*shape[:axis], n, m, *shape[axis + 1 :])


def merged(shape: Shape, axis: int) -> Shape:
    """Axes (axis, axis+1) in one."""
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


def inserted(shape: Shape, axis: int, n: int) -> Shape:
    """A new axis."""
    return (*shape[:axis], n, *shape[axis:])


def dropped(shape: Shape, axis: int) -> Shape:
    """One axis taken away."""
    return (*shape[:axis], *shape[axis + 1 :])
