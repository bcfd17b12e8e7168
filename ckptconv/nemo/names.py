"""Names of tensors in NeMo's files: Megatron's own behind the names of the modules that held the model.

`model.` in .nemo files, `model.module.` where the wrapper for half precision was saved too, `module.` in NeMo 2 folders. A loader takes
this off and a saver puts it on: everything of Megatron's (mappings, measuring, module state) then serves NeMo as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv.errors import FormatError
from ckptconv.megatron.measure import LEGACY as MEGATRON_LEGACY
from ckptconv.tensor import Shape

NEMO1, NEMO2 = "model.", "module."
PREFIXES = ("model.module.", NEMO1, NEMO2)
LEGACY = replace(MEGATRON_LEGACY, norms=("input_layernorm.",))
# of NeVA, inside the word embedding; legacy models have that in `language_model.`
ADAPTER, ENCODER = INSIDE = ("embedding.word_embeddings.adapter_layer.", "embedding.word_embeddings.vision_encoder.")
_NEST = "language_model."
_OPTIMIZER = ("optimizer.", "chained_")
_GATE, _UP = "mlp.dense_h_to_4h.", "mlp.dense_h_to_4h_2."


def prefix_of(names: Iterable[str], where: object) -> str:
    """What stands before every name of the model; empty for a bare state dict (a chunk of an interleaved pipeline)."""
    model = [name for name in names if not name.startswith(_OPTIMIZER)]
    prefix = next((p for p in PREFIXES if model and all(name.startswith(p) for name in model)), "")
    odd = [name for name in model if not prefix and name.startswith(PREFIXES)]
    if odd:
        bare = next((name for name in model if not name.startswith(PREFIXES)), odd[-1])
        raise FormatError(where, f"names begin differently: {odd[0]} and {bare}; expected one of {', '.join(PREFIXES)}")
    return prefix


def joined_gates(shapes: Dict[str, Shape]) -> dict[str, Shape]:
    """Shapes to measure a legacy model by: gate and up, where they are two tensors, seen as the one that they are elsewhere."""
    out = {name: shape for name, shape in shapes.items() if _UP not in name}
    for name in shapes.keys() - out.keys():
        gate = name.replace(_UP, _GATE)
        if (shape := out.get(gate)) and shape == shapes[name]:
            out[gate] = (2 * shape[0], *shape[1:])
    return out


def is_legacy(names: Iterable[str]) -> bool:
    """Whether they are those of NeMo's own models from before Megatron-Core."""
    return any(name.startswith(_NEST) for name in names)


def nested(name: str) -> bool:
    """Whether a tensor is of the projector or the image encoder of NeVA."""
    return unnested(name).startswith(INSIDE)


def unnested(name: str) -> str:
    """Its name as a Megatron-Core model has it."""
    return name.removeprefix(_NEST)


def nested_as(name: str, *, legacy: bool) -> str:
    """Its name as a model of one kind or the other has it."""
    return _NEST + name if legacy and name.startswith(INSIDE) else name
