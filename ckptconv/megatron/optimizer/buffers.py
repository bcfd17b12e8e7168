"""Optimizer state as the distributed optimizer files it: parameters end to end in flat buffers, whatever the data parallel size.

Every model chunk has a buffer for each dtype of its parameters, in the order in which those first come. In it the parameters stand
in reverse, each at a multiple of 64 elements. Buckets, the parts that are communicated at once, are padded in memory and
not in the file; but a bucket begins aligned, so where buckets end matters when sizes are no multiples of 64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER
from ckptconv.containers.pickled import TorchDType
from ckptconv.dtypes import FP32, DType
from ckptconv.errors import FormatError
from ckptconv.megatron.optimizer.entries import table
from ckptconv.megatron.optimizer.lists import Slot
from ckptconv.megatron.optimizer.members import Member
from ckptconv.nodes import Fill, concat
from ckptconv.tensor import Shape, Tensor

FILED = {"param": MASTER, "exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}
ALIGNMENT = 64
SMALLEST_BUCKET, BUCKET_PER_REPLICA = 40_000_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Buffer:
    """Which element each member begins at, and how many there are."""

    dtype: DType
    places: tuple[tuple[Member, int], ...]
    numel: int


def buffers(members: Sequence[Member], bucket: int | None = None, alignment: int = ALIGNMENT) -> list[Buffer]:
    """All buffers of one optimizer, in the order of their numbers. `bucket`: how full the first chunk's buckets get."""
    kinds: dict[tuple[int, DType], list[Member]] = {}
    for member in members:
        kinds.setdefault((member.chunk, member.dtype), []).append(member)
    return [
        _laid_out(dtype, held, None if chunk else bucket, alignment)
        for (chunk, dtype), held in sorted(kinds.items(), key=lambda kind: kind[0][0])
    ]


def _laid_out(dtype: DType, members: Sequence[Member], bucket: int | None, alignment: int) -> Buffer:
    places = []
    start = at = 0  # of the bucket in the file, and of the next parameter in the bucket
    for member in reversed(members):
        at = -(-at // alignment) * alignment
        places.append((member, start + at))
        at += member.numel
        if member.alone or (bucket is not None and at >= bucket):
            start, at = start + at, 0
    return Buffer(dtype, tuple(places), start + at)


def bucket_size(args: Dict[str, object], pp: int) -> int | None:
    """When Megatron begins another bucket: only on the first stage, and only where it overlaps communication."""
    if pp or args.get("overlap_grad_reduce") is not True:
        return None
    asked, replicas = args.get("ddp_bucket_size"), args.get("data_parallel_size")
    if isinstance(asked, int):
        return asked
    return max(SMALLEST_BUCKET, BUCKET_PER_REPLICA * (replicas if isinstance(replicas, int) else 1))


def read(saved: object, members: Sequence[Member], bucket: int | None, where: str) -> Iterator[tuple[Slot, Tensor]]:
    """Every slot of an optimizer's members, narrowed out of its buffers."""
    held = {key: value for key, value in table(saved, where).items() if isinstance(key, int)}
    if table(saved, where).get("buckets_coalesced") is not True:
        raise FormatError(
            where,
            "is from before Megatron-Core 0.7: its buckets are padded for one data parallel size; resave it there first",
        )
    layouts = [buffers(members, bucket, alignment) for alignment in (ALIGNMENT, 1)]  # 0.7 does not align
    if sorted(held) != list(range(len(layouts[0]))):
        raise FormatError(where, f"has buffers {sorted(held)}, expected {len(layouts[0])} of them")
    for number, candidates in enumerate(zip(*layouts, strict=True)):
        yield from _slots(held[number], candidates, f"{where} buffer {number}")


def _slots(saved: object, candidates: Sequence[Buffer], where: str) -> Iterator[tuple[Slot, Tensor]]:
    ((kind, flat),) = table(saved, where).items() if len(table(saved, where)) == 1 else ((None, None),)
    dtype = kind[0] if isinstance(kind, tuple) and kind else kind
    if not isinstance(dtype, TorchDType) or dtype.dtype != candidates[0].dtype:
        raise FormatError(where, f"is of {kind}, expected parameters of {candidates[0].dtype.torch} alone")
    world = table(flat, where)
    stated = world.get("numel_unpadded")  # all parameters with what stands between them
    for name, slot in FILED.items():
        tensor = world.get(name)
        size = tensor.shape if isinstance(tensor, Tensor) else None
        buffer = next((b for b in candidates if (b.numel,) == size), None)
        if buffer is None or not isinstance(tensor, Tensor):
            raise FormatError(where, f"{name} has shape {size}, expected ({candidates[0].numel},) for these parameters")
        if stated not in (None, buffer.numel):
            raise FormatError(where, f"numel_unpadded is {stated}, expected {buffer.numel} for these parameters")
        for member, at in buffer.places:
            yield (member, slot), _unfolded(tensor.narrow(0, at, at + member.numel), member.shape)


def write(
    members: Sequence[Member], slots: Dict[Slot, Tensor], grads: DType | None, bucket: int | None
) -> dict[object, object]:
    """The buffers with zeros between parameters. `grads`: the dtype that gradients are summed in, None for that of the parameters."""
    saved: dict[object, object] = {"buckets_coalesced": True}
    for number, buffer in enumerate(buffers(members, bucket)):
        kind = TorchDType(buffer.dtype.torch), TorchDType((grads or buffer.dtype).torch)
        world: dict[object, object] = {name: _flat(buffer, slots, slot) for name, slot in FILED.items()}
        saved[number] = {kind: {**world, "numel_unpadded": buffer.numel}}
    return saved


def _flat(buffer: Buffer, slots: Dict[Slot, Tensor], slot: str) -> Tensor:
    parts: list[Tensor] = []
    at = 0
    for member, start in buffer.places:
        parts += [Fill((start - at,), FP32), _folded(slots[member, slot])]
        at = start + member.numel
    return concat(parts, 0)


def _unfolded(flat: Tensor, shape: Shape) -> Tensor:
    for axis in range(len(shape) - 1):
        flat = flat.unfold(axis, shape[axis], flat.shape[axis] // shape[axis])
    return flat


def _folded(tensor: Tensor) -> Tensor:
    while len(tensor.shape) > 1:
        tensor = tensor.fold(0)
    return tensor
