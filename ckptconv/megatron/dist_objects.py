"""The objects of a distributed checkpoint: one `_extra_state` for every module that has one, of every layer and expert."""

from __future__ import annotations

import re

from ckptconv.bind import bind
from ckptconv.config import ModelConfig
from ckptconv.dtypes import UINT8
from ckptconv.mapping_files import load_mapping
from ckptconv.megatron.extra_state import NAME, ExtraState
from ckptconv.megatron.measure import LAYER
from ckptconv.nodes import Fill
from ckptconv.topology import Rank, even

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def objects(config: ModelConfig, extra: ExtraState, *, stacked: bool) -> dict[str, object]:
    """What a model that one process holds has in its state_dict, under the keys that all processes share."""
    variant = frozenset({"experts_sequential"})
    table = bind(load_mapping("mcore"), variant, config, even(config.layers), Rank())
    entries = extra.beside({row.stored: Fill((0,), UINT8) for row in table}, last=False)
    return {
        _key(name, config, stacked=stacked): value
        for name, value in entries.items()
        if name.endswith(NAME) and not name.startswith("output_layer.")  # Megatron-Core leaves that one out
    }


def _key(name: str, config: ModelConfig, *, stacked: bool) -> str:
    """The name without the numbers that say which part of the object it is: layer, where layers share a name, and expert."""
    parts: list[tuple[str, int]] = []
    if stacked and (layer := LAYER.search(name)):
        parts.append((layer[1], config.layers))
        name = f"{name[: layer.start(1)]}{name[layer.end() :]}"
    if expert := _EXPERT.search(name):
        parts.append((expert[1], config.experts))
        name = f"{name[: expert.start()]}.experts.{name[expert.end() :]}"
    index, size = zip(*(parts or [("0", 1)]), strict=True)
    return f"{name}/shard_{'.'.join(index)}_{'.'.join(map(str, size))}"
