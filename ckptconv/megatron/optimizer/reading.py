"""Training state of a checkpoint of rank files: every process's slots under the names of its tensors, the rest as one TrainingState."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv.checkpoint import Key, Stored, TrainingState
from ckptconv.containers import torch_file
from ckptconv.errors import FormatError
from ckptconv.megatron.folders import OPTIMIZER_FILES
from ckptconv.megatron.grid import Process
from ckptconv.megatron.optimizer import buffers, lists
from ckptconv.megatron.optimizer.agreement import agreed, without_copies
from ckptconv.megatron.optimizer.entries import Entry, entries, settings_of
from ckptconv.megatron.optimizer.lists import Slot
from ckptconv.megatron.optimizer.members import Member, rules
from ckptconv.megatron.rank_file import RankContent
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank


def attach(stored: Stored, contents: Dict[Process, RankContent], *, check: bool) -> Stored:
    """The checkpoint with the optimizer state of its files."""
    chains = {p: entries(content.training["optimizer"], str(content.file.path)) for p, content in contents.items()}
    state = _state(chains, contents)
    args = next(iter(contents.values())).args or {}
    given = rules(stored.config, stored.topology, args)
    slots: dict[Process, dict[Slot, Tensor]] = {}
    wanted: set[tuple[int, Member]] = set()
    for process, content in contents.items():
        known = [{n: t for n, t in chunk.items() if not stored.mapping.ignores(n)} for chunk in content.chunks]
        members, bucket = given.members(known), buffers.bucket_size(args, process[0])
        slots[process] = dict(_slots(content, chains[process], members, bucket, check=check))
        wanted |= {(process[0], member) for member in members}
    lost = wanted - {(process[0], member) for process, held in slots.items() for member, _ in held}
    if lost and state.updates:
        names = ", ".join(sorted(f"pp {pp}: {m.name}" for pp, m in lost)[:8])
        raise FormatError("the optimizer", f"no rank has the state of {len(lost)} parameters: {names}")
    ranks = {}
    pairs = list(stored.replicas)
    for rank, tensors in stored.ranks.items():
        ranks[rank], same = without_copies({**tensors, **_of_rank(slots, rank)}, stored.places[rank])
        pairs += same
    return replace(stored, ranks=ranks, extras=replace(stored.extras, training=state), replicas=tuple(pairs))


def _of_rank(slots: Dict[Process, Dict[Slot, Tensor]], rank: Rank) -> dict[Key, Tensor]:
    held = slots[rank.pp, rank.tp, rank.ep]
    return {Key(member.name, slot): tensor for (member, slot), tensor in held.items() if member.chunk == rank.vpp}


def _slots(
    content: RankContent, chain: Sequence[Entry], members: Sequence[Member], bucket: int | None, *, check: bool
) -> Iterator[tuple[Slot, Tensor]]:
    path = content.file.path
    if lacking := {m.expert for m in members} - {entry.expert for entry in chain}:
        raise FormatError(
            path, f"has no optimizer of the {'experts' if True in lacking else 'parameters other than experts'}"
        )
    flat = _flat(content, len(chain), check=check) if any(entry.state is None for entry in chain) else []
    for number, entry in enumerate(chain):
        own = [m for m in members if m.expert == entry.expert]
        if entry.state is not None:
            yield from lists.read(entry, own)
        elif flat[number] is not None:
            yield from buffers.read(
                flat[number], own, bucket, f"{path.parent / OPTIMIZER_FILES[0]}: optimizer {number}"
            )


def _flat(content: RankContent, count: int, *, check: bool) -> list[object]:
    """The buffers of each optimizer of the chain; None where another process has them."""
    path = content.file.path.parent / OPTIMIZER_FILES[0]
    if not path.exists():
        return [None] * count
    saved = torch_file.read(path, check=check)
    held = saved if isinstance(saved, list) else [saved]
    if len(held) != count:
        raise FormatError(path, f"has the buffers of {len(held)} optimizers, the rank file has {count}")
    return held


def _state(chains: Dict[Process, list[Entry]], contents: Dict[Process, RankContent]) -> TrainingState:
    """What is said beside tensors. Every process says it again, and all must say the same."""
    schedulers = [c.training.get("opt_param_scheduler", c.training.get("lr_scheduler")) for c in contents.values()]
    scheduler = schedulers[0]
    if any(said != scheduler for said in schedulers):
        raise FormatError("opt_param_scheduler", "is not the same on all ranks; are two checkpoints mixed?")
    return replace(
        agreed(entry for chain in chains.values() for entry in chain),
        scheduler=None if scheduler is None else settings_of(scheduler, "opt_param_scheduler"),
        rng={process: c.training["rng_state"] for process, c in contents.items() if "rng_state" in c.training},
    )
