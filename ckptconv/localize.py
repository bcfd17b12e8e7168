"""Export: the canonical graph to every rank's tensors in a dialect's names; every canonical tensor finds a place, or all that do not are listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ckptconv.bind import Binding, bind, put_together
from ckptconv.checkpoint import Checkpoint, Key, Stored, Target
from ckptconv.errors import CoverageError
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank


def localize(checkpoint: Checkpoint, target: Target, format_name: str, drop: Sequence[str] = ()) -> Stored:
    """Every rank's tensors put together from their parts of the atoms."""
    slots = sorted({key.slot for key in checkpoint.tensors})
    ranks: dict[Rank, dict[Key, Tensor]] = {}
    used: set[Key] = set()
    problems: list[str] = []
    for rank in target.topology.ranks():
        tensors = ranks[rank] = {}
        for binding in bind(target.mapping, target.variant, checkpoint.config, target.topology, rank):
            if binding.copy:
                continue
            for slot in slots:
                needed = [Key(a, slot) for a in binding.atoms]
                if absent := [k for k in needed if k not in checkpoint.tensors]:
                    if slot == "param":
                        problems += [f"missing: {k}, needed for {binding.stored} on {rank}" for k in absent]
                    continue
                used.update(needed)
                tensors[Key(binding.stored, slot)] = _assembled(binding, slot, checkpoint, rank)
    problems += [f"no place for: {k}" for k in checkpoint.tensors if k not in used and not _matches(k.name, drop)]
    if problems:
        raise CoverageError(
            f"{target.mapping.name} cannot hold this model:",
            problems,
            "Leave a tensor out on purpose with --drop GLOB (canonical name), or say where it goes with --mapping FILE.",
        )
    left_out = tuple(k.name for k in checkpoint.tensors if k not in used)
    notes = checkpoint.extras.notes + tuple(f"dropped on request: {name}" for name in left_out)
    return Stored(
        format_name, target.mapping, target.variant, target.topology, checkpoint.config, ranks,
        extras=replace(checkpoint.extras, notes=notes),
    )  # fmt: skip


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _assembled(binding: Binding, slot: str, checkpoint: Checkpoint, rank: Rank) -> Tensor:
    try:
        whole = put_together(binding.expr, binding.env, lambda name: checkpoint.tensors[Key(name, slot)])
    except ValueError as error:
        raise CoverageError(
            f"{binding.stored} on {rank} cannot be put together:", [str(error)], "Parts of unlike dtypes need --dtype."
        ) from None
    return whole if binding.box is None else whole.narrow(0, *binding.box)
