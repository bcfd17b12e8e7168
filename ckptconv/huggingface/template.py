"""What a vision tower's source does not tell, as a template or the family has it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptconv.config import ModelConfig
from ckptconv.errors import ConfigError
from ckptconv.huggingface.config_table import fixed_or_default
from ckptconv.mapping import Mapping
from ckptconv.tower_passes import VISION

# what neither Megatron's files of a tower nor shapes tell: settings, and parts that Megatron's towers lack
SETTINGS = ("norm_eps", "activation")
UNTOLD = (*SETTINGS, "image", "final_norm", "projection", "pooling")
SIZES = ("layers", "hidden", "head_dim", "ffn", "patch", "max_positions")


def as_template(config: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """A tower, or that of a larger model, with what the template's config says of it; both must be of one size."""
    if not config.towers:
        return _tower(config, theirs)
    if VISION not in theirs.towers:
        raise ConfigError(f"--saver.template: {theirs.family} has no vision tower, the checkpoint has one")
    towers = {**config.towers, VISION: _tower(config.towers[VISION], theirs.towers[VISION])}
    if "projector" in towers and "projector" in theirs.towers:
        towers["projector"] = replace(towers["projector"], newline=theirs.towers["projector"].newline)
    return replace(config, towers=towers)


def _tower(config: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    for name in SIZES:
        if getattr(config, name) != getattr(theirs, name):
            raise ConfigError(
                f"--saver.template: {name} of its vision tower is {getattr(theirs, name)}, of the checkpoint's {getattr(config, name)}"
            )
    return replace(config, **{name: getattr(theirs, name) for name in UNTOLD})


def as_family(config: ModelConfig, mapping: Mapping) -> ModelConfig:
    """The tower, or that of a larger model, with the settings that its family has when nothing is said, and the norm behind it, if any."""
    if config.towers:
        return replace(config, towers={**config.towers, VISION: as_family(config.towers[VISION], mapping)})
    usual: dict[str, Any] = fixed_or_default(mapping)
    settings = {name: usual[name] for name in SETTINGS if name in usual}
    return replace(config, **settings, final_norm=usual.get("final_norm", True))
