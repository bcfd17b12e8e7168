"""Training state of a checkpoint of rank files: every process's slots under the names of its tensors, the rest as one TrainingState."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, Key, Stored, TrainingState
from ckptconv.containers import torch_file
from ckptconv.dtypes import FP32
from ckptconv.errors import FormatError
from ckptconv.megatron.folders import OPTIMIZER_FILES
from ckptconv.megatron.grid import Process
from ckptconv.megatron.optimizer import buffers, lists
from ckptconv.megatron.optimizer.agreement import agreed, check_counted, without_copies
from ckptconv.megatron.optimizer.entries import Entry, entries, settings_of
from ckptconv.megatron.optimizer.lists import Slot
from ckptconv.megatron.optimizer.members import Member, rules
from ckptconv.megatron.rank_file import RankContent
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank

Holder = tuple[int, ...]  # (pp, tp), or of experts with an optimizer of their own (pp, etp, ep)


def attach(stored: Stored, contents: Dict[Process, RankContent], *, check: bool) -> Stored:
    """The checkpoint with the optimizer state of its files."""
    chains = {p: entries(content.training["optimizer"], str(content.file.path)) for p, content in contents.items()}
    args = next(iter(contents.values())).args or {}
    given = rules(stored.config, stored.topology, args)
    state = replace(_state(chains, contents), experts_apart=given.experts_apart)
    slots: dict[Process, dict[Slot, Tensor]] = {}
    wanted: dict[Process, list[Member]] = {}
    for process, content in contents.items():
        known = [{n: t for n, t in chunk.items() if not stored.mapping.ignores(n)} for chunk in content.chunks]
        wanted[process], bucket = given.members(known), buffers.bucket_size(args, process[0])
        slots[process] = dict(_slots(content, chains[process], wanted[process], bucket, check=check))
    _refuse_lost(wanted, slots, stored.topology.etp, state.updates)
    ranks = {}
    pairs = list(stored.replicas)
    for rank, tensors in stored.ranks.items():
        ranks[rank], same = without_copies({**tensors, **_of_rank(slots, rank)}, stored.places[rank])
        pairs += same
    return replace(stored, ranks=ranks, extras=replace(stored.extras, training=state), replicas=tuple(pairs))


def _refuse_lost(
    wanted: Dict[Process, Sequence[Member]], slots: Dict[Process, Iterable[Slot]], etp: int, updates: int
) -> None:
    """Of the processes that hold the same parameter one has its state. Names count from the first layer and expert of a process."""

    def holder(process: Process, member: Member) -> Holder:
        pp, tp, ep = process
        return (pp, tp % etp, ep) if member.expert else (pp, tp)

    moments = updates > 0 or any(slot == EXP_AVG for held in slots.values() for _, slot in held)
    needed = {(holder(p, m), m, slot) for p, members in wanted.items() for m in members for slot in _needed(m, moments)}
    lost = needed - {(holder(p, m), m, slot) for p, held in slots.items() for m, slot in held}
    if lost:
        count = len({(place[0], place[2:], member) for place, member, _ in lost})  # not each tensor rank's part
        words = {2: ("pp", "tp"), 3: ("pp", "etp", "ep")}
        told = sorted(
            " ".join(f"{word}={n}" for word, n in zip(words[len(place)], place, strict=True)) + f": {Key(m.name, slot)}"
            for place, m, slot in lost
        )
        raise FormatError("the optimizer", f"no rank has the state of {count} parameters:\n  " + "\n  ".join(told[:8]))


def _needed(member: Member, moments: bool) -> tuple[str, ...]:
    masters = () if member.dtype == FP32 else (MASTER,)
    return (*masters, EXP_AVG, EXP_AVG_SQ) if moments else masters


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
    flat = _flat(content, chain, check=check)
    for number, entry in enumerate(chain):
        own = [m for m in members if m.expert == entry.expert]
        found: dict[Slot, Tensor] = {}
        if entry.state is not None:
            found = dict(lists.read(entry, own))
        elif flat[number] is not None:
            where = f"{path.parent / OPTIMIZER_FILES[0]}: optimizer {number}"
            found = dict(buffers.read(flat[number], own, bucket, where))
        if any(slot != MASTER for _, slot in found):
            check_counted([entry], entry.where)
        yield from found.items()


def _flat(content: RankContent, chain: Sequence[Entry], *, check: bool) -> list[object]:
    """The buffers of each optimizer of the chain; None where another process has them."""
    path, count = content.file.path.parent / OPTIMIZER_FILES[0], len(chain)
    if not path.exists():
        return [None] * count
    if all(entry.state is not None for entry in chain):
        raise FormatError(
            path,
            f"is beside {content.file.path.name}, which has the whole optimizer state itself: which of the two is meant is not "
            "known; move one away, or --optimizer drop converts the weights alone",
        )
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
        agreed([entry for chain in chains.values() for entry in chain]),
        scheduler=None if scheduler is None else settings_of(scheduler, "opt_param_scheduler"),
        rng={process: c.training["rng_state"] for process, c in contents.items() if "rng_state" in c.training},
    )
