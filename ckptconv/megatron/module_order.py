"""The order in which a model's modules list their parameters. Mappings name the same parameters, and put some of them elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(\w+)")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_PARTS = ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")


def in_module_order(names: Iterable[str]) -> list[str]:
    """Layer by layer; in each its norms where Megatron's own modules have them, and expert by expert where each is a module."""
    ordered = list(names)
    layers = [i for i, name in enumerate(ordered) if _LAYER.match(name)]
    if layers:
        lo, hi = layers[0], layers[-1] + 1
        ordered[lo:hi] = sorted(ordered[lo:hi], key=_place)
    return ordered


def _place(name: str) -> tuple[int, int, int]:
    """Names with the same place stay as they stand."""
    layer, part = _LAYER.findall(name)[0]
    expert = _EXPERT.search(name)
    return int(layer), _PARTS.index(part), int(expert[1]) if expert else -1
