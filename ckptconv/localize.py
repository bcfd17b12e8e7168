"""Export: the canonical graph to every rank's tensors in a dialect's names; every atom finds a place, or all that do not are listed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ckptconv.bind import Binding, bind, put_together
from ckptconv.checkpoint import Checkpoint, Key, Stored, Target
from ckptconv.errors import CoverageError
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank


def localize(checkpoint: Checkpoint, target: Target, format_name: str) -> Stored:
    """Every rank's tensors put together from their parts of the atoms."""
    export = _Export(checkpoint)
    ranks: dict[Rank, dict[Key, Tensor]] = {}
    for rank in target.topology.ranks():
        table = bind(target.mapping, target.variant, checkpoint.config, target.topology, rank)
        tensors = ranks[rank] = {}
        for binding in table:
            if not binding.copy:
                export.put(binding, rank, tensors)
    homeless = [key for key in checkpoint.tensors if key.name not in export.used[key.slot]]
    omitted = [key for key in homeless if target.mapping.omits(key.name)]
    problems = export.problems + [f"no place for: {key}" for key in homeless if key not in omitted]
    if problems:
        raise CoverageError(
            f"{target.mapping.name} cannot hold this model:",
            problems,
            "Leave a tensor out on purpose with --drop GLOB (canonical name), or say where it goes with --mapping FILE.",
        )
    extras = checkpoint.extras
    if omitted:
        note = f"left out, {target.mapping.name} has no place for them: {', '.join(map(str, omitted))}"
        extras = replace(extras, notes=(*extras.notes, note))
    return Stored(format_name, target.mapping, target.variant, target.topology, checkpoint.config, ranks, extras=extras)


class _Export:
    """Puts stored tensors together, noting which canonical ones have found a place and which were wanted in vain."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {slot: {} for slot in sorted({k.slot for k in checkpoint.tensors})}
        for key, tensor in checkpoint.tensors.items():
            self.tensors[key.slot][key.name] = tensor
        self.used: dict[str, set[str]] = {slot: set() for slot in self.tensors}
        self.takers = {slot: partial(self.take, slot) for slot in self.tensors}
        self.problems: list[str] = []

    def put(self, binding: Binding, rank: Rank, into: dict[Key, Tensor]) -> None:
        """A stored tensor in every slot that its atoms have."""
        for slot, take in self.takers.items():
            try:
                whole = put_together(binding.expr, binding.env, take)
            except KeyError:
                self.note_absent(binding, slot, rank)
                continue
            except ValueError as error:
                self.problems.append(
                    f"{binding.stored} on {rank} cannot be put together: {error}; unlike dtypes need --dtype"
                )
                continue
            into[Key(binding.stored, slot)] = whole if binding.box is None else whole.narrow(0, *binding.box)

    def take(self, slot: str, name: str) -> Tensor:
        tensor = self.tensors[slot][name]
        self.used[slot].add(name)
        return tensor

    def note_absent(self, binding: Binding, slot: str, rank: Rank) -> None:
        """A parameter must be there; another slot may be absent, but then from all operands."""
        absent = [name for name in binding.atoms if name not in self.tensors[slot]]
        if slot == "param" or len(absent) < len(binding.atoms):
            self.problems += [f"missing: {Key(name, slot)}, needed for {binding.stored} on {rank}" for name in absent]
