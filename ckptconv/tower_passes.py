"""Edits of the canonical graph that vision towers need: dummy attention heads, and atoms that the source had no place for."""

from __future__ import annotations

from dataclasses import replace

from ckptconv.checkpoint import Checkpoint, Key, Target
from ckptconv.config import ModelConfig
from ckptconv.errors import ConfigError, CoverageError
from ckptconv.mapping import Mapping
from ckptconv.nodes import Fill, concat
from ckptconv.tensor import Tensor

VISION = "vision"
HEAD_AXES = ("q", "kv")


def vision_tower(config: ModelConfig) -> ModelConfig | None:
    """The vision tower that a model is or has."""
    return config if config.kind == VISION else config.towers.get(VISION)


def resize_heads(checkpoint: Checkpoint, heads: int | None, mapping: Mapping) -> Checkpoint:
    """The vision tower with `heads` attention heads (None: as it is): dummy ones are cut away at the end, or zeros added there."""
    config = checkpoint.config
    tower = vision_tower(config)
    if heads is None or tower is None or heads == tower.heads:
        return checkpoint
    true = tower.true_heads or tower.heads
    if heads < true or tower.kv_heads != tower.heads:
        raise ConfigError(
            f"a vision tower of {true} attention heads and {tower.kv_heads} key/value heads cannot be given {heads} of each"
        )
    under = "" if tower is config else f"{VISION}."
    tensors = {
        key: _with_heads(key.name, tensor, tower, true, heads, mapping) if key.name.startswith(under) else tensor
        for key, tensor in checkpoint.tensors.items()
    }
    resized = replace(tower, heads=heads, kv_heads=heads, true_heads=None if heads == true else true)
    whole = resized if tower is config else replace(config, towers={**config.towers, VISION: resized})
    return replace(checkpoint, config=whole, tensors=tensors)


def _with_heads(name: str, tensor: Tensor, tower: ModelConfig, true: int, heads: int, mapping: Mapping) -> Tensor:
    atom = mapping.vocabulary.atom_of(name)
    for axis, called in enumerate(atom.axes if atom else ()):
        if called in HEAD_AXES:
            tensor = tensor.narrow(axis, 0, true * tower.head_dim)
            if heads > true:
                dummy = (*tensor.shape[:axis], (heads - true) * tower.head_dim, *tensor.shape[axis + 1 :])
                tensor = concat([tensor, Fill(dummy, tensor.dtype)], axis)
    return tensor


def put_back(checkpoint: Checkpoint, target: Target, source: Mapping) -> Checkpoint:
    """What the source's dialect has no place for, and the target's has, taken from the model that the target brings along."""
    config = target.config or checkpoint.config
    if not source.omit:
        return replace(checkpoint, config=config)
    taken_out = any(rule.scope == config.kind for rule in source.rules)  # of a larger model, whose mapping this is
    under = f"{config.kind}." if taken_out else ""
    absent = [
        name
        for name, _ in target.mapping.vocabulary.expected(config)
        if Key(name) not in checkpoint.tensors and source.omits(under + name) and not target.mapping.omits(name)
    ]
    donor = target.donor.tensors if target.donor else {}
    if lacking := [name for name in absent if Key(name) not in donor]:
        raise CoverageError(
            f"{target.mapping.name} needs what {source.name} has no place for, and the source therefore lacks:",
            [f"missing: {name}" for name in lacking],
            "--saver.template FOLDER takes it from the Hugging Face folder (with weights) that the source was made from.",
        )
    if not absent:
        return replace(checkpoint, config=config)
    note = f"taken from the template, {source.name} has no place for them: {', '.join(absent)}"
    return replace(
        checkpoint,
        config=config,
        tensors={**checkpoint.tensors, **{Key(name): donor[Key(name)] for name in absent}},
        extras=replace(checkpoint.extras, notes=(*checkpoint.extras.notes, note)),
    )
