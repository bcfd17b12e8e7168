"""The objects of a distributed checkpoint: one `_extra_state` for every module that has one, of every layer and expert."""

from __future__ import annotations

import re

from ckptconv.bind import bind
from ckptconv.config import ModelConfig
from ckptconv.dtypes import UINT8
from ckptconv.mapping_files import load_mapping
from ckptconv.megatron.extra_state import NAME, ExtraState
from ckptconv.megatron.measure import LAYER
from ckptconv.megatron.towers import LANGUAGE, PROJECTOR, VISION, under
from ckptconv.nodes import Fill
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, even

AROUND = ("ln_pre", "ln_post")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def objects(config: ModelConfig, extra: ExtraState, *, stacked: bool) -> dict[str, object]:
    """What a model that one process holds has in its state_dict, under the keys that all processes share."""
    variant = frozenset({"experts_sequential"})
    mapping = load_mapping("mcore-vlm" if config.towers else "mcore")
    table = bind(mapping, variant, config, even(config.layers), Rank())
    tensors: dict[str, Tensor] = {row.stored: Fill((0,), UINT8) for row in table}
    entries = _of_parts(tensors, extra) if config.towers else extra.beside(tensors, last=False)
    return {
        _key(name, _part(name, config), stacked=stacked): value
        for name, value in entries.items()
        if name.endswith(NAME) and "output_layer." not in name  # Megatron-Core leaves that one out
    }


def _of_parts(tensors: dict[str, Tensor], extra: ExtraState) -> dict[str, object]:
    """Part by part, each as if it were a language model's; the projector is an MLP."""
    out: dict[str, object] = {}
    for prefix, module in ((LANGUAGE, ""), (VISION, ""), (PROJECTOR, "mlp.")):
        own = {module + name: tensor for name, tensor in under(prefix, tensors).items()}
        entries = extra.beside(own, last=False)
        if prefix == VISION:  # InternViT's norms are its own class, those around a tower are TransformerEngine's
            entries = {name: value for name, value in entries.items() if not name.endswith(f"layernorm.{NAME}")}
            entries |= {f"{norm}.{NAME}": Fill((0,), UINT8) for norm in AROUND if _has_state(norm, own, extra)}
        out |= {prefix + name.removeprefix(module): value for name, value in entries.items()}
    return out


def _has_state(norm: str, tensors: dict[str, Tensor], extra: ExtraState) -> bool:
    """TransformerEngine's norms have an entry from 1.13 on."""
    return f"{norm}.weight" in tensors and extra.te is not None and extra.te >= (1, 13)


def _part(name: str, config: ModelConfig) -> ModelConfig:
    """The part of the model that a name is of, whose layers it counts."""
    return config.towers["vision"] if name.startswith(VISION) else config


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
