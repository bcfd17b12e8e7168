"""Upgrade: a checkpoint of any era of Megatron to the form that today's Megatron-Core saves, and what that changes."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv.checkpoint import Checkpoint
from ckptconv.errors import UsageError
from ckptconv.formats.mcore_dist import LAYERS, McoreDist, McoreDistSave, args_of
from ckptconv.megatron.args_write import PLAIN
from ckptconv.pipeline import Job, Prepared, prepare

ERAS = {
    "legacy": "Megatron-LM before Megatron-Core, one file per process",
    "mcore": "Megatron-Core, one file per process",
    "mcore-dist": "Megatron-Core, distributed",
}
# the variants of legacy names whose rows of queries, keys and values stand in another order than today
MOVED_ROWS = {"qkv_v0": "queries, keys and values apart", "qkv_v1": "queries, keys and values in turn"}


def prepare_upgrade(job: Job) -> tuple[Prepared, list[str]]:
    """The conversion to torch_dist, and what it changes, a line each. Weights are the same, bit for bit, unless a cast is asked for."""
    prepared = prepare(replace(job, saver=McoreDist.name))
    checkpoint = prepared.checkpoint
    origin = checkpoint.origin
    if origin.format not in ERAS:
        raise UsageError(
            f"the source is in format {origin.format}, which is of no era of Megatron: "
            "use convert (ckptconv convert SRC DST --saver mcore-dist)"
        )
    assert isinstance(prepared.options, McoreDistSave)
    return prepared, list(_changes(prepared, args_of(prepared.stored, prepared.options, job.request())))


def _changes(prepared: Prepared, args: Dict[str, object]) -> Iterator[str]:
    checkpoint, stored = prepared.checkpoint, prepared.stored
    origin, backend = checkpoint.origin, args["ckpt_format"]
    yield f"format: {ERAS[origin.format]} ({_form(checkpoint)}) -> {ERAS[McoreDist.name]} ({backend}, {_layers(stored.mapping.name)})"
    if origin.mapping != stored.mapping.name:
        renamed = len({key.name for tensors in stored.ranks.values() for key in tensors})
        yield f"names: of {origin.mapping} -> of {stored.mapping.name} ({renamed} tensors)"
    for variant in origin.variant & MOVED_ROWS.keys():
        yield f"attention rows: {MOVED_ROWS[variant]} -> grouped by query group"
    if origin.topology.degree("tp") * origin.topology.pp * origin.topology.ep > 1:
        yield f"layout: {origin.topology.pp * origin.topology.processes_per_stage} rank files -> whole tensors, cut when they are loaded"
    for name in checkpoint.dropped:
        yield f"left out: {name}"
    old = checkpoint.extras.objects.get("args")
    yield from _args_changes(old if isinstance(old, dict) else {}, args)


def _form(checkpoint: Checkpoint) -> str:
    told = checkpoint.extras.objects.get("backend")
    return str(told) if told else ", ".join(sorted(checkpoint.origin.variant)) or checkpoint.origin.mapping


def _layers(mapping: str) -> str:
    return next((f"layers {name}" for name, known in LAYERS.items() if known == mapping), mapping)


def _args_changes(old: Dict[str, object], new: Dict[str, object]) -> Iterator[str]:
    """Fields of args that say something else, and which are new or gone."""
    for name in sorted(old.keys() & new.keys()):
        if _plain(old[name]) != _plain(new[name]):
            yield f"args.{name}: {_short(old[name])} -> {_short(new[name])}"
    for what, names in (("new in args", new.keys() - old.keys()), ("left out of args", old.keys() - new.keys())):
        if names:
            yield f"{what}: {', '.join(sorted(names))}"


def _plain(value: object) -> object:
    return value if isinstance(value, (*PLAIN, list, tuple)) else str(value)


def _short(value: object) -> str:
    text = repr(_plain(value))
    return text if len(text) <= 60 else text[:57] + "..."
