"""Folders of zarr v2 arrays laid out as Megatron-Core 0.12 wrote them: raw chunks in row-major order, no fill value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from ckptconv.containers.zarr2_header import HEADER, Header, render
from ckptconv.errors import PlanError
from ckptconv.nodes import Fill, concat
from ckptconv.plan import File, Segment
from ckptconv.shapes import sized
from ckptconv.tensor import Shape, Tensor


def layout(
    prefix: str, tensors: Mapping[str, tuple[Tensor, Shape]], objects: Mapping[str, bytes] | None = None
) -> list[File]:
    """Files below the folder `prefix`: tensors by key, each with the shape of its chunks; objects by `<key>/shard_0_4`."""
    base = f"{prefix}/" if prefix else ""
    files: list[File] = []
    for key, (tensor, chunks) in tensors.items():
        if "/" in key or key.startswith("."):
            raise PlanError(f"{key!r} cannot be the folder of a zarr array: a key has no slash and begins with no dot")
        files += _array(f"{base}{key}", key, tensor, chunks)
    files += [File(f"{base}{key}.pt", len(data), (Segment(0, data),)) for key, data in (objects or {}).items()]
    return files


def _array(folder: str, key: str, tensor: Tensor, chunks: Shape) -> Iterator[File]:
    if len(chunks) != len(tensor.shape) or any(n < 1 for n in chunks):
        raise PlanError(f"{key}: chunks of {chunks} cannot cut a tensor of shape {tensor.shape}")
    header = Header(tensor.dtype, tensor.shape, chunks)
    said = render(header)
    yield File(f"{folder}/{HEADER}", len(said), (Segment(0, said),))
    for index in product(*map(range, header.grid)):
        chunk = _chunk(tensor, header.start(index), chunks)
        yield File(f"{folder}/{header.name_of(index)}", chunk.nbytes, (Segment(0, chunk, key),))


def _chunk(tensor: Tensor, start: Shape, chunks: Shape) -> Tensor:
    """One chunk, whole: beyond the edges of the tensor there are zeros."""
    for axis, (at, size) in enumerate(zip(start, chunks, strict=True)):
        tensor = tensor.narrow(axis, at, min(at + size, tensor.shape[axis]))
        beyond = size - tensor.shape[axis]
        if beyond:
            tensor = concat([tensor, Fill(sized(tensor.shape, axis, beyond), tensor.dtype)], axis)
    return tensor
