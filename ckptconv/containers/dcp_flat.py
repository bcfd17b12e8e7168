"""Tensors that Megatron-Core up to 0.15 flattened shard by shard, seen again in the shape that they had.

The shards lie on a grid, which is the shape as stored but for its last axis. Along that axis are the elements of a shard in
row-major order, cut wherever the ranges of data parallel ranks ended.
"""

from __future__ import annotations

import math

from ckptconv.errors import FormatError
from ckptconv.tensor import Shape, Tensor


def restored(tensor: Tensor, shape: Shape, where: str) -> Tensor:
    """The tensor of this shape."""
    grid, axes = tensor.shape[:-1], range(len(shape))
    fits = 0 < len(shape) == len(grid) and all(g and n % g == 0 for n, g in zip(shape, grid, strict=True))
    shard = [n // g for n, g in zip(shape, grid, strict=True)] if fits else []
    if not fits or math.prod(shard) != tensor.shape[-1]:
        raise FormatError(
            where, f"is stored flat in shape {tensor.shape}, which no shards of a tensor of shape {shape} make"
        )
    for axis, size in enumerate(shard[:-1], len(grid)):
        tensor = tensor.unfold(axis, size, tensor.shape[axis] // size)
    tensor = tensor.permute([place for axis in axes for place in (axis, axis + len(grid))])
    for axis in axes:
        tensor = tensor.fold(axis)
    return tensor
