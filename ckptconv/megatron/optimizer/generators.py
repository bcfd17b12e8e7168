"""States of random-number generators: rank files hold that of their process, distributed checkpoints have shards by stage and tensor rank.

They say nothing at other tensor and pipeline sizes: Megatron takes them up only where the run has those that args tell. With
experts dealt to ranks a third number counts replicas of the model, which rank files do not: which shard is whose is not known there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping as Dict
from dataclasses import replace
from itertools import product

from ckptconv.checkpoint import Stored
from ckptconv.megatron.grid import Process

FILED = "rng_state"  # in the objects of a checkpoint: the shards of a distributed one, by key
_SHARD = re.compile(r"rng_state/shard_(\d+)\.(\d+)(?:\.\d+)?_(\d+)\.(\d+)(\.\d+)?")
Shards = dict[str, object]
RESEEDED = "--no-load-rng has Megatron seed them"


def by_process(shards: Shards) -> dict[Process, object]:
    """Those that belong to one process each."""
    matches = ((_SHARD.fullmatch(key), state) for key, state in shards.items())
    return {(int(m[1]), int(m[2]), 0): state for m, state in matches if m and not m[5]}


def shards(stored: Stored) -> Shards:
    """What a distributed checkpoint holds: the shards of one, or those that states of rank files become."""
    training = stored.extras.training
    if training is None:
        return {}
    if isinstance(filed := stored.extras.objects.get(FILED), dict):
        return filed
    pps, tps = (1 + max((process[axis] for process in training.rng), default=-1) for axis in (0, 1))
    if training.rng.keys() != set(product(range(pps), range(tps), (0,))):
        return {}
    return {f"rng_state/shard_{pp}.{tp}_{pps}.{tps}": state for (pp, tp, _), state in sorted(training.rng.items())}


def sizes(found: Shards) -> Dict[str, object]:
    """The args that tell whose the shards are; nothing without shards."""
    if (match := next((m for key in found if (m := _SHARD.fullmatch(key))), None)) is None:
        return {}
    return {"pipeline_model_parallel_size": int(match[3]), "tensor_model_parallel_size": int(match[4])}


def kept(stored: Stored, *, distributed: bool) -> bool:
    """Whether the states go along. Rank files take those of the very same processes."""
    if distributed:
        return bool(shards(stored))
    training = stored.extras.training
    return training is not None and bool(training.rng) and training.rng.keys() == set(stored.topology.processes())


def unless_dealt_anew(stored: Stored, apart: bool) -> Stored:
    """Without the states where experts get, or lose, an optimizer of their own: other processes then, and other shards."""
    training = stored.extras.training
    if training is None or apart == training.experts_apart or not shards(stored):
        return stored
    return replace(stored, extras=replace(stored.extras, objects={**stored.extras.objects, FILED: {}}))


def left_out(stored: Stored, *, distributed: bool) -> tuple[str, ...]:
    """What of the training state a run will not find, and why."""
    training = stored.extras.training
    there = training is not None and (training.rng or FILED in stored.extras.objects)
    if training is None or not there or kept(stored, distributed=distributed):
        return ()
    if training.rng and not distributed:
        return (f"states of random-number generators belong to processes, and these are others: {RESEEDED}",)
    return (
        (
            "states of random-number generators are left out: with experts dealt to ranks, distributed checkpoints have them numbered by "
            f"replica of the model, and which is whose is not stored; {RESEEDED}"
        ),
    )
