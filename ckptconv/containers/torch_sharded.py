"""One process's part of a tensor as FSDP pickles it (ShardedTensor, DTensor): where it lies in the whole, told without a process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from ckptconv.assemble import assemble
from ckptconv.containers.pickled import Global, Opaque
from ckptconv.containers.plain_calls import PLAIN_CALLS, Args, Call
from ckptconv.containers.unpickle import Unpickler
from ckptconv.errors import FormatError
from ckptconv.tensor import Shape, Tensor

_WRAPPED = Global("torch._utils", "_rebuild_wrapper_subclass")
_DTENSOR = {
    ("torch.distributed.tensor", "DTensor"),
    ("torch.distributed._tensor.api", "DTensor"),
    ("torch.distributed._tensor", "DTensor"),
}
_SHARDED = ("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")


@dataclass(frozen=True, slots=True)
class Part:
    """`pieces`: (offset, tensor) where the file says the offset. `rows`: the process's piece of axis `axis` (None: the whole tensor),
    whose offset follows from the pieces of the processes before it.
    """

    shape: Shape
    pieces: tuple[tuple[Shape, Tensor], ...] = ()
    rows: Tensor | None = None
    axis: int | None = None


def part(value: object, where: str) -> Part | None:
    """What a pickled value is a part of; None if it is no such value."""
    match value:
        case Opaque(name="_rebuild_from_type_v2", args=(Global() as call, Global() as cls, tuple() as inner, state)):
            if call != _WRAPPED or len(inner) < 3 or not _is_shape(inner[2]):
                return None
            if (cls.module, cls.name) in _DTENSOR:
                return _of_dtensor(inner[2], state, where)
            if (cls.module, cls.name) == _SHARDED:
                return _of_sharded(inner[2], state, where)
    return None


def whole(parts: Sequence[Part], where: str) -> Tensor:
    """The tensor that the parts of all processes, in their order, make."""
    shape, first = parts[0].shape, parts[0]
    if any((p.shape, p.axis, p.rows is None) != (shape, first.axis, first.rows is None) for p in parts):
        raise FormatError(where, f"processes tell its shape or its cut differently: {sorted({p.shape for p in parts})}")
    if first.rows is None:
        pieces = [piece for p in parts for piece in p.pieces]
    elif first.axis is None:
        pieces = [((0,) * len(shape), first.rows)]
    else:
        pieces, at = [], 0
        for rows in (p.rows for p in parts if p.rows is not None):
            pieces.append((tuple(at if i == first.axis else 0 for i in range(len(shape))), rows))
            at += rows.shape[first.axis]
    pieces = [(offset, tensor) for offset, tensor in pieces if 0 not in tensor.shape]
    try:
        return assemble(shape, pieces)
    except ValueError as error:
        raise FormatError(where, f"the pieces of {len(parts)} processes do not make {shape}: {error}") from None


def _of_dtensor(shape: Shape, state: object, where: str) -> Part:
    """Cut along one axis; the mesh says nothing that is needed."""
    told = _table(state)
    local, placements = told.get("_local_tensor"), _fields(told.get("_spec")).get("placements")
    if not isinstance(local, Tensor) or not isinstance(placements, tuple):
        raise FormatError(
            where, "is a DTensor of a form that is not known: expected _local_tensor, and placements in _spec"
        )
    cuts = [axis for placement in placements if (axis := _axis(placement, where)) is not None]
    if len(cuts) > 1 or (cuts and not 0 <= cuts[0] < len(shape)):
        raise FormatError(where, f"is cut along axes {cuts} of {shape}; FSDP cuts along one")
    return Part(shape, rows=local, axis=cuts[0] if cuts else None)


def _axis(placement: object, where: str) -> int | None:
    """The axis that a placement cuts; None for Replicate."""
    kind = placement.name if isinstance(placement, Opaque) else ""
    axis = _fields(placement).get("dim")
    if kind == "Shard" and type(axis) is int:
        return axis
    if kind == "Replicate":
        return None
    raise FormatError(where, f"is placed as {placement!r:.80}: known are Shard and Replicate")


def _of_sharded(shape: Shape, state: object, where: str) -> Part:
    """A list of shards, each with its offsets."""
    pieces = []
    for shard in state[0] if isinstance(state, tuple) and state and isinstance(state[0], list) else [None]:
        told = _fields(shard)
        tensor, offsets = told.get("tensor"), _fields(told.get("metadata")).get("shard_offsets")
        offset = tuple(offsets) if isinstance(offsets, list) else None
        if not isinstance(tensor, Tensor) or not _is_shape(offset) or len(offset) != len(shape):
            raise FormatError(
                where, "is a ShardedTensor of a form that is not known: expected shards with their offsets"
            )
        pieces.append((offset, tensor))
    return Part(shape, tuple(pieces))


def _fields(value: object) -> Mapping[object, object]:
    """Attributes of an object."""
    return _table(value.state) if isinstance(value, Opaque) else {}


def _table(state: object) -> Mapping[object, object]:
    """A state as attributes by name, whether the class has slots or not."""
    fields = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    return fields if isinstance(fields, dict) else {}


def _is_shape(value: object) -> TypeGuard[Shape]:
    return isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)


def _getattr(u: Unpickler, args: Args) -> object:
    """The class inside ShardedTensor, which is called afterwards; any other member as everywhere."""
    if args == (Global(*_SHARDED), "ProcessGroupState"):
        return u.find(_SHARDED[0], f"{_SHARDED[1]}.ProcessGroupState")
    return PLAIN_CALLS[Global("builtins", "getattr")](u, args)


SHARDED_CALLS: Mapping[Global, Call] = {Global(module, "getattr"): _getattr for module in ("builtins", "__builtin__")}
