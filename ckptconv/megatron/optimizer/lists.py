"""Optimizer state by parameter number: Float16OptimizerWithFloat16Params (master weights in lists) and FP32Optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER
from ckptconv.dtypes import FP32
from ckptconv.errors import FormatError
from ckptconv.leaves import full
from ckptconv.megatron.optimizer.entries import Entry
from ckptconv.megatron.optimizer.members import Member, Settings, has_decay
from ckptconv.tensor import Tensor

Slot = tuple[Member, str]


def read(entry: Entry, members: Sequence[Member]) -> Iterator[tuple[Slot, Tensor]]:
    """Every slot of an optimizer's members. Groups hold numbers in the order of the members."""
    masters = entry.masters if entry.masters is not None else [[] for _ in entry.groups]
    if len(masters) != len(entry.groups) or entry.state is None:
        raise FormatError(
            entry.where, f"has {len(masters)} lists of master weights for {len(entry.groups)} param groups"
        )
    for group, copies in zip(entry.groups, masters, strict=True):
        held = [m for m in members if m.decays == has_decay(group)]
        numbers = group.get("params")
        if not isinstance(numbers, list) or len(numbers) != len(held):
            raise _other_count(entry, group, numbers, len(held))
        halves = [m for m in held if m.dtype != FP32] if entry.masters is not None else []
        if len(copies) != len(halves):
            raise FormatError(
                entry.where, f"has {len(copies)} master weights for {len(halves)} parameters that are not fp32"
            )
        yield from (((m, MASTER), _checked(entry, m, MASTER, copy)) for m, copy in zip(halves, copies, strict=True))
        for member, number in zip(held, numbers, strict=True):
            yield from _moments(entry, member, number)


def _moments(entry: Entry, member: Member, number: object) -> Iterator[tuple[Slot, Tensor]]:
    """Both moments, or none before the first update."""
    if not entry.state:
        return
    held = entry.state.get(number, {}) if isinstance(number, int) else {}
    if held.keys() - {"step"} != {EXP_AVG, EXP_AVG_SQ}:
        found = ", ".join(map(str, held)) or "nothing"
        raise FormatError(
            entry.where, f"parameter {number} ({member.name}) has {found}; only Adam's exp_avg and exp_avg_sq are known"
        )
    yield from (((member, slot), _checked(entry, member, slot, held[slot])) for slot in (EXP_AVG, EXP_AVG_SQ))


def _checked(entry: Entry, member: Member, slot: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != member.shape:
        found = value.shape if isinstance(value, Tensor) else type(value).__name__
        raise FormatError(
            entry.where,
            f"{slot} in the place of {member.name} has shape {found}, expected {member.shape}: parameters are numbered otherwise",
        )
    return value


def _other_count(entry: Entry, group: Settings, numbers: object, expected: int) -> FormatError:
    found = len(numbers) if isinstance(numbers, list) else "no"
    kind = "with" if has_decay(group) else "without"
    return FormatError(
        entry.where,
        f"the param group {kind} weight decay has {found} parameters, expected {expected}: parameters are frozen, or grouped by "
        "rules of one's own, and which is which is not stored; --optimizer drop converts the weights alone",
    )


def write(
    groups: Sequence[Settings],
    members: Sequence[Member],
    slots: dict[Slot, Tensor],
    updates: int,
    *,
    fused: bool,
    moments: bool,
) -> dict[object, object]:
    """The torch optimizer's own dictionary. FusedAdam counts updates in its groups, torch's with each parameter.

    `moments`: there are any; torch's optimizer makes them at its first update, and until then has no state.
    """
    numbers = count()
    state: dict[object, object] = {}
    rows: list[object] = []
    for settings in groups:
        numbered = [(next(numbers), m) for m in members if m.decays == has_decay(settings)]
        for number, member in numbered:
            held: dict[object, object] = {} if fused else {"step": full((), FP32, updates)}
            if moments:
                state[number] = held | {slot: slots[member, slot] for slot in (EXP_AVG, EXP_AVG_SQ)}
        step = {"step": updates} if fused else {}
        rows.append({**settings, **step, "params": [number for number, _ in numbered]})
    return {"state": state, "param_groups": rows}


def masters(groups: Sequence[Settings], members: Sequence[Member], slots: dict[Slot, Tensor]) -> list[object]:
    """Master weights of the parameters that are not fp32, by group."""
    return [
        [slots[m, MASTER] for m in members if m.decays == has_decay(settings) and m.dtype != FP32]
        for settings in groups
    ]
