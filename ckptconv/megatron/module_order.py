"""The order in which Megatron-Core's modules list their parameters. Mappings name the same ones, and have some of them elsewhere."""

from __future__ import annotations

import re

from ckptconv.megatron.measure import LAYER

_LAYER_ORDER = ("input_layernorm.", "self_attention.", "pre_mlp_layernorm.", "mlp.router.", "mlp.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def position(name: str) -> tuple[int, int, int, int]:
    """A key to sort names by: end of the model, layer, module of the layer, expert; else they stay as they stand."""
    layer = LAYER.search(name)
    if layer is None:
        return (0 if name.startswith("embedding.") else 2), 0, 0, 0
    rest = name[layer.end() :]
    module, expert = _module(rest), _EXPERT.search(rest) if "local_experts" in rest else None
    return 1, int(layer[1]), module, int(expert[1]) if expert else 0


def _module(name: str) -> int:
    for i, start in enumerate(_LAYER_ORDER):
        if name.startswith(start):
            return i
    return len(_LAYER_ORDER)
