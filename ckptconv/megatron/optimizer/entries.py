"""What a rank file has under `optimizer`, taken apart: one entry, or one for each optimizer of a chain (dense, experts)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckptconv.errors import FormatError
from ckptconv.megatron.optimizer.members import Settings, has_decay, of_experts
from ckptconv.tensor import Tensor

Table = dict[object, object]


@dataclass(frozen=True, slots=True)
class Entry:
    """One optimizer. `state` is by parameter number, None where flat buffers hold it; `masters` are lists by group, None where
    the model is fp32 and has none.
    """

    where: str
    groups: tuple[Settings, ...]
    state: dict[int, Table] | None
    masters: list[list[object]] | None
    grad_scaler: Settings | None

    @property
    def expert(self) -> bool:
        return any(map(of_experts, self.groups))

    def updates(self) -> Iterator[int]:
        """Every count of updates that is told, in groups (FusedAdam) or with each parameter (torch)."""
        for told in [*self.groups, *(self.state or {}).values()]:
            if (step := told.get("step")) is not None:  # type: ignore[attr-defined]
                yield _count(step, self.where)


def chain(optimizer: object) -> list[object]:
    """The members of a chain, or the one optimizer there is; numbers as keys are how distributed checkpoints spell a list."""
    if isinstance(optimizer, dict) and optimizer and all(isinstance(key, int) for key in optimizer):
        return [optimizer[key] for key in sorted(optimizer)]
    return optimizer if isinstance(optimizer, list) else [optimizer]


def entries(optimizer: object, where: str) -> list[Entry]:
    """Entries in the order of the chain."""
    members = chain(optimizer)
    if len(members) == 1:
        return [_entry(members[0], f"{where}: optimizer")]
    return [_entry(each, f"{where}: optimizer {i}") for i, each in enumerate(members)]


def _entry(saved: object, where: str) -> Entry:
    outer = table(saved, where)
    wrapped = next((key for key in ("optimizer", "optimizer_state_dict") if key in outer), None)
    inner = table(outer[wrapped], where) if wrapped else outer
    groups = [settings_of(group, where) for group in _list(inner.get("param_groups"), f"{where} param_groups")]
    kinds = [has_decay(group) for group in groups]
    if len(set(kinds)) < len(kinds):
        raise FormatError(
            where,
            f"{len(groups)} param groups: only weight decay may tell them apart, one group with it and one without",
        )
    state = inner.get("state")
    masters = outer.get("fp32_from_fp16_params", outer.get("fp32_from_fp16"))
    scaler = outer.get("grad_scaler")
    return Entry(
        where,
        tuple(groups),
        None if state is None else _numbered(state, f"{where} state"),
        None if masters is None else [_list(row, f"{where} fp32_from_fp16_params") for row in _list(masters, where)],
        None if scaler is None else settings_of(scaler, f"{where} grad_scaler"),
    )


def table(value: object, where: str) -> Table:
    if not isinstance(value, dict):
        raise FormatError(where, f"is a {type(value).__name__}, expected a dictionary")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list):
        raise FormatError(where, f"is a {type(value).__name__}, expected a list")
    return value


def settings_of(value: object, where: str) -> Settings:
    held = table(value, where)
    if not all(isinstance(key, str) for key in held):
        raise FormatError(where, "has keys that are no names")
    return {str(key): item for key, item in held.items()}


def _numbered(value: object, where: str) -> dict[int, Table]:
    held = table(value, where)
    if not all(isinstance(key, int) for key in held):
        raise FormatError(where, "has keys that are no parameter numbers")
    return {int(str(key)): table(item, f"{where} {key}") for key, item in held.items()}


def _count(step: object, where: str) -> int:
    """A count of updates: a number, or torch's tensor of one (four bytes, read here)."""
    number: object = step.numpy().item() if isinstance(step, Tensor) and step.shape in ((), (1,)) else step
    if isinstance(number, float) and number.is_integer():  # not so inf and NaN
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise FormatError(where, f"step is {number!r}, expected how many updates were made")
    return number
