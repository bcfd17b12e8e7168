"""The keys of a distributed checkpoint: which are the model's, what the others are, and what the model's say of its sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.errors import ConfigError
from ckptconv.megatron.measure import LAYER, MCORE, Measured, measure
from ckptconv.tensor import Shape

EXTRA_STATE = "_extra_state"
MAX_LAYERS = 1 << 16
OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer(?:\.|$)")
_SHARD = re.compile(r"/shard_[\d.]*_[\d.]*$")
_EXPERTS = re.compile(r"^mlp\.experts\.experts\.")
_STACKED = "layers."


@dataclass(frozen=True, slots=True)
class Keys:
    """`model`: the model's tensors; `extra`: objects with the state of a module; `state`: training state in words; `strays`: the rest."""

    model: tuple[str, ...]
    extra: tuple[str, ...]
    state: tuple[str, ...]
    strays: tuple[str, ...]


def sort_keys(tensors: Iterable[str], objects: Iterable[str]) -> Keys:
    """Keys by what they are for; nothing is left out."""
    kept: dict[str, list[str]] = {"model": [], "extra": [], "optimizer": [], "rng": [], "stray": []}
    for key in tensors:
        kept["optimizer" if OPTIMIZER.match(key) else "model"].append(key)
    for key in objects:
        base = _SHARD.sub("", key)
        if base.endswith(EXTRA_STATE):
            kept["extra"].append(key)
        else:
            kept["optimizer" if OPTIMIZER.match(base) else "rng" if base == "rng_state" else "stray"].append(key)
    state = [f"optimizer ({len(kept['optimizer'])} entries)"] if kept["optimizer"] else []
    state += ["RNG state"] if kept["rng"] else []
    return Keys(tuple(kept["model"]), tuple(kept["extra"]), tuple(state), tuple(kept["stray"]))


def is_separate(names: Iterable[str]) -> bool:
    """Whether each layer has names of its own."""
    return any(LAYER.search(name) for name in names)


def measure_whole(shapes: Dict[str, Shape]) -> Measured:
    """What whole tensors say of the model, in any of the three key layouts."""
    return measure(shapes, shapes, _layers(shapes), MCORE, 1, 1)


def one_by_one(shapes: Dict[str, Shape]) -> dict[str, Shape]:
    """The shapes as if each layer had names of its own."""
    if is_separate(shapes):
        return dict(shapes)
    out: dict[str, Shape] = {}
    for name, shape in shapes.items():
        before, found, rest = name.partition(_STACKED)
        if not found:
            out[name] = shape
        for i in range(_count(name, shape) if found and shape else 0):
            out[f"{before}{_STACKED}{i}.{rest}"] = shape[1:]
    return out


def _count(name: str, shape: Shape) -> int:
    if shape[0] > MAX_LAYERS:
        raise ConfigError(f"{name} has shape {shape}: {shape[0]:,} layers are damage, not a model")
    return shape[0]


def _layers(shapes: Dict[str, Shape]) -> list[dict[str, Shape]]:
    """The shapes of each layer, under the names that one rank would have for them."""
    if is_separate(shapes):
        layers: dict[int, dict[str, Shape]] = {}
        for name, shape in shapes.items():
            if match := LAYER.search(name):
                _put(layers.setdefault(int(match[1]), {}), name[match.end() :], shape)
        return [layers[i] for i in sorted(layers)]
    layer: dict[str, Shape] = {}
    count = 0
    for name, shape in shapes.items():
        _, found, rest = name.partition(_STACKED)
        if found and shape:
            count = max(count, _count(name, shape))
            _put(layer, rest, shape[1:])
    return [layer] * count


def _put(layer: dict[str, Shape], name: str, shape: Shape) -> None:
    """One name: experts as the first of a rank's, the halves of a gated fc1 as the whole."""
    if match := _EXPERTS.match(name):
        rest = name[match.end() :]
        number, found, inner = rest.partition(".")
        single = found and number.isdecimal()
        if not (single and int(number)):
            layer[f"mlp.experts.local_experts.0.{inner if single else rest}"] = shape if single else shape[1:]
        return
    if name.endswith(("_w", "_v")) and "linear_fc1." in name and shape:
        name, shape = name[:-2], (2 * shape[0], *shape[1:])
    layer[name] = shape
