"""Vision towers and projectors in Megatron's names: which chunks hold them, and what their tensors say of the architecture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ckptconv.config import ModelConfig, projector_config
from ckptconv.errors import ConfigError
from ckptconv.huggingface.config_table import fixed_or_default
from ckptconv.mapping import Mapping
from ckptconv.megatron.args_multimodal import TYPES
from ckptconv.megatron.extra_state import NAME as EXTRA_STATE
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.measure import layer_count
from ckptconv.megatron.rank_file import RankContent
from ckptconv.tensor import Shape, Tensor
from ckptconv.tower_passes import vision_tower

LANGUAGE, VISION, PROJECTOR = "language_model.", "vision_model.", "vision_projection.encoder."
PATCHES = ("conv1.weight", "embedder.weight")  # one of them is in every tower
Value = TypeVar("Value")
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
HEADS_FLAG = "--loader.vision-heads"
_QKV, _PROJ = "decoder.layers.0.self_attention.linear_qkv.", "decoder.layers.0.self_attention.linear_proj."
_FC1, _FC2 = "decoder.layers.0.mlp.linear_fc1.", "decoder.layers.0.mlp.linear_fc2."
# (hidden, layers, ffn) of the towers that Megatron's example knows -> family, attention heads: its files do not say them.
# Of two of one size it is the first, which has a converter
KNOWN = {(t.hidden, t.layers, t.ffn): (t.family, t.heads) for t in reversed(TYPES.values())}


def is_vision(names: Iterable[str]) -> bool:
    """Whether these are the names of a vision tower alone."""
    return any(name in PATCHES for name in names)


def is_multimodal(names: Iterable[str]) -> bool:
    """Whether a language model's names stand under a prefix, beside those of other parts; legacy models nest theirs alike."""
    return any(name.startswith((LANGUAGE + "decoder.", VISION, PROJECTOR)) for name in names)


def under(prefix: str, entries: Dict[str, Value]) -> dict[str, Value]:
    """What stands under a part's prefix, by its names in the part alone."""
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def part(content: RankContent, prefix: str) -> RankContent:
    """A rank's file as if it held one part of the model alone."""
    return replace(content, chunks=tuple(under(prefix, chunk) for chunk in content.chunks))


@dataclass(frozen=True, slots=True)
class Said:
    """What is stated of a tower beside its tensors: by a config, by options, and by args (family and heads of a kind they name)."""

    config: ModelConfig | None = None
    heads: int | None = None
    family: str | None = None
    args: tuple[str, int] | None = None


def family_for(family: Mapping | None) -> str | None:
    """The tower's family, of what --family names: a tower's, or a whole model's with its parts'."""
    if family is None or family.parts:
        return next((part.family for part in family.parts if part.scope == "vision"), None) if family else None
    return family.name if fixed_or_default(family).get("kind") == "vision" else None


def towers(
    first: Dict[str, Shape], tp: int, stated: Dict[str, ModelConfig], said: Said, where: str
) -> dict[str, ModelConfig]:
    """The towers whose tensors the first tensor rank of the first stage holds."""
    found = {}
    for name, prefix in (("vision", VISION), ("projector", PROJECTOR)):
        shapes = under(prefix, first)
        if shapes and name == "vision":
            found[name] = vision(shapes, tp, replace(said, config=stated.get(name)), where)
        elif shapes:
            found[name] = projector(shapes, tp)
    return found


def vision(shapes: Dict[str, Shape], tp: int, said: Said, where: str) -> ModelConfig:
    """The tower's config, as stated or as its tensors have it; heads stand in no shape, and dummy ones may have been added."""
    hidden = _hidden(shapes, where)
    layers = layer_count(shapes, where)
    ffn = _size(shapes, _FC2 + "weight", 1) * tp
    family, heads = _family_and_heads(said, (hidden, layers, ffn), where)
    if not heads or hidden % heads:
        found = f"{heads} do not divide its {hidden} entries" if heads else "nothing says it"
        raise ConfigError(
            f"{where}: how many attention heads the vision tower has cannot be measured, and {found}; "
            f"give {HEADS_FLAG} N, or --loader.config FOLDER (with the config.json of all that the files hold)"
        )
    head_dim = said.config.head_dim if said.config else hidden // heads
    stored = _size(shapes, _PROJ + "weight", 1) * tp // head_dim
    true = heads if stored != heads else None
    if said.config is not None:
        return replace(said.config, heads=stored, kv_heads=stored, true_heads=true)
    return ModelConfig(
        family, layers, hidden, stored, stored, head_dim, ffn, 0, true_heads=true, **_measured(shapes, tp, hidden, ffn)
    )


def _family_and_heads(said: Said, sizes: tuple[int, int, int], where: str) -> tuple[str, int | None]:
    """As a config says, else options, else args, else what is known of towers of these sizes."""
    if said.config is None:
        family, heads = said.args or KNOWN.get(sizes) or ("hf-clip", None)
        return said.family or family, said.heads or heads
    stated = said.config.true_heads or said.config.heads
    if said.heads not in (None, stated):
        raise ConfigError(
            f"{where}: {HEADS_FLAG} {said.heads}, but the config of the vision tower says {stated} attention heads; "
            f"leave {HEADS_FLAG} out, or give --loader.config FOLDER with a config.json that says {said.heads}"
        )
    return said.config.family, stated


def _hidden(shapes: Dict[str, Shape], where: str) -> int:
    for name in ("class_token", "position_embeddings.weight", "position_embeddings", "conv1.weight"):
        if name in shapes:
            return shapes[name][0 if name == "conv1.weight" else -1]
    raise ConfigError(f"{where}: the vision tower has neither patches nor positions")


def _size(shapes: Dict[str, Shape], name: str, axis: int) -> int:
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else 0


def _measured(shapes: Dict[str, Shape], tp: int, hidden: int, ffn: int) -> dict[str, Any]:
    """All that shapes and names tell beyond sizes of the layers."""
    linear = "embedder.weight" in shapes
    patch = round((_size(shapes, "embedder.weight", 1) / 3) ** 0.5) if linear else _size(shapes, "conv1.weight", 2)
    positions = _size(shapes, "position_embeddings.weight", 0) or _size(shapes, "position_embeddings", 1)
    tokens = 0 if "class_token" not in shapes else shapes["class_token"][-2]
    norm_bias = _QKV + "layer_norm_bias" in shapes or "decoder.layers.0.input_layernorm.bias" in shapes
    side = int((positions - (0 if linear else tokens)) ** 0.5)
    return {
        "kind": "vision",
        "max_positions": positions,
        "learned_positions": positions > 0,
        "rope": None,
        "norm": "layernorm" if norm_bias else "rmsnorm",
        "activation": "gelu",
        "glu": _size(shapes, _FC1 + "weight", 0) * tp == 2 * ffn,
        "qkv_bias": _QKV + "bias" in shapes,
        "out_bias": _PROJ + "bias" in shapes,
        "mlp_bias": _FC2 + "bias" in shapes,
        "final_norm": "ln_post.weight" in shapes,
        "pre_norm": "ln_pre.weight" in shapes,
        "qk_norm_full": "decoder.layers.0.self_attention.q_layernorm.weight" in shapes,
        "layer_scale": "decoder.layers.0.ls1" in shapes,
        "class_tokens": tokens,
        "mask_token": "mask_token" in shapes,
        "patch": patch,
        "patch_bias": "conv1.bias" in shapes or "embedder.bias" in shapes,
        "patch_linear": linear,
        "image": side * patch,
    }


def projector(shapes: Dict[str, Shape], tp: int) -> ModelConfig:
    """The projector's config: everything about it can be measured."""
    hidden, local = shapes.get("linear_fc2.weight", (0, 0))
    bias = "linear_fc1.layer_norm_bias" in shapes
    return projector_config(
        inputs=_size(shapes, "linear_fc1.weight", 1),
        ffn=local * tp,
        hidden=hidden,
        pre_norm="linear_fc1.layer_norm_weight" in shapes,
        norm="layernorm" if bias else "rmsnorm",
        mlp_bias="linear_fc1.bias" in shapes,
    )


def split_ranks(contents: Sequence[RankContent]) -> list[RankContent]:
    """The language model's part of every rank of a multimodal model."""
    return [part(content, LANGUAGE) for content in contents]


def with_extra_state(extra: ExtraState, tensors: Dict[str, Tensor], *, last: bool) -> dict[str, object]:
    """A chunk's tensors with the `_extra_state` entries of their modules, part by part."""
    if is_vision(tensors):  # Megatron's own converters of towers write no entries for its local modules
        return dict(tensors) if extra.te is None else _beside_linears(tensors)
    if not is_multimodal(tensors):
        return extra.beside(tensors, last=last)
    out: dict[str, object] = {}
    for prefix in (LANGUAGE, VISION, PROJECTOR):
        own = under(prefix, tensors)
        beside = extra.beside(own, last=last) if prefix == LANGUAGE else _beside_linears(own)
        out |= {prefix + name: value for name, value in beside.items()}
    return out


def _beside_linears(tensors: Dict[str, Tensor]) -> dict[str, object]:
    """None beside every linear layer, as the modules' state_dict has it."""
    out: dict[str, object] = {}
    for name, tensor in tensors.items():
        out[name] = tensor
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.endswith(LINEAR):
            out[f"{module}.{EXTRA_STATE}"] = None
    return out


def padded_heads(config: ModelConfig, tp: int) -> int | None:
    """Heads with dummy ones that tp can cut, for InternViT, whose number nothing divides; None: as they are."""
    tower = vision_tower(config)
    return -(-(tower.true_heads or tower.heads) // tp) * tp if tower is not None and tower.qk_norm_full else None
