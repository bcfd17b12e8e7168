"""What is said or stored more than once of one optimizer, which must be the same: settings by all ranks, weights by their masters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Dict

from ckptconv.checkpoint import MASTER, Key, Replica, TrainingState
from ckptconv.dtypes import FP32
from ckptconv.errors import FormatError
from ckptconv.megatron.optimizer.entries import Entry
from ckptconv.megatron.optimizer.members import Settings, has_decay
from ckptconv.tensor import Tensor
from ckptconv.values import Cast

OF_LAYOUT = ("params", "step", "is_expert_parallel")  # said of groups elsewhere, or by the layout


def agreed(said: Sequence[Entry]) -> TrainingState:
    """Groups, count of updates and scaler of gradients that all optimizers of all ranks agree on."""
    groups: dict[bool, Settings] = {}
    updates: set[int] = set()
    for entry in said:
        updates |= set(entry.updates())
        for group in entry.groups:
            settings = {key: value for key, value in group.items() if key not in OF_LAYOUT}
            first = groups.setdefault(has_decay(settings), settings)
            if unlike := sorted(k for k in first.keys() | settings if first.get(k) != settings.get(k)):
                raise FormatError(
                    entry.where, f"param groups of one kind differ, here or between ranks, in {', '.join(unlike)}"
                )
    if len(updates) > 1:
        raise FormatError("the optimizer", f"parameters have had different numbers of updates: {sorted(updates)}")
    ordered = tuple(groups[kind] for kind in sorted(groups, reverse=True))
    return TrainingState(ordered, next(iter(updates), 0), grad_scaler=_scaler(said))


def check_counted(said: Iterable[Entry], where: str) -> None:
    """Of optimizers that have moments: Adam corrects these by how many updates were made, so 0 must not be guessed."""
    if not any(True for entry in said for _ in entry.updates()):
        raise FormatError(
            where,
            "has moments, but no step in its param groups or beside them, expected how many updates were made; "
            "--optimizer drop converts the weights alone",
        )


def _scaler(said: Sequence[Entry]) -> Settings | None:
    """The scaler of gradients, of which every optimizer keeps a copy."""
    for entry in said:
        a, b = _values(said[0].grad_scaler), _values(entry.grad_scaler)
        if a != b:
            raise FormatError(
                entry.where, f"grad_scaler is {b}, but {a} in {said[0].where}; are two checkpoints mixed?"
            )
    return said[0].grad_scaler if said else None


def _values(scaler: Settings | None) -> Settings | None:
    """With numbers for tensors of one number, which are equal wherever they are stored."""
    if scaler is None:
        return None
    single = ((), (1,))
    return {k: v.numpy().item() if isinstance(v, Tensor) and v.shape in single else v for k, v in scaler.items()}


def without_copies(tensors: Dict[Key, Tensor], where: str) -> tuple[dict[Key, Tensor], list[Replica]]:
    """The tensors of a rank but for masters of weights that are fp32 themselves, and pairs that must be equal.

    A weight is its rounded master. Optimizer state has no names, so this is what shows that each is in its place.
    """
    kept = dict(tensors)
    pairs = []
    for key, master in tensors.items():
        if key.slot != MASTER:
            continue
        weight = tensors[Key(key.name)]
        if weight.dtype == FP32:
            del kept[key]
            pairs.append(Replica(key.name, weight, master, f"{where}: the optimizer's own copy"))
        else:
            rounded = master.map(Cast(master.dtype, weight.dtype), weight.dtype)
            pairs.append(Replica(key.name, weight, rounded, f"{where}: the master weight, rounded"))
    return kept, pairs
