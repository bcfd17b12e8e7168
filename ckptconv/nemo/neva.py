"""NeVA, NeMo's LLaVA: what its files hold beside a language model, or instead of one that was not trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ckptconv.checkpoint import Extras, Key, Stored
from ckptconv.config import ModelConfig, projector_config
from ckptconv.containers import json_file
from ckptconv.dialect import detect, prefix_of
from ckptconv.errors import ConfigError, FormatError, UsageError
from ckptconv.formats import Request
from ckptconv.huggingface.family_config import family_of, own_section, read_config
from ckptconv.huggingface.files import CONFIG, folder_of, read_weights
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import families, load_mapping
from ckptconv.megatron.args_read import ArgsLayout
from ckptconv.megatron.rank_file import RankContent
from ckptconv.megatron.towers import KNOWN
from ckptconv.nemo.names import ADAPTER, ENCODER, nested, unnested
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Rank, even

WHOLE, ALONE = "nemo-neva", "nemo-adapter"
HEADS_FLAG, ENCODER_FLAG = "--loader.vision-heads", "--loader.vision-encoder"
CLIP, SIGLIP = ENCODERS = ("hf-clip", "hf-siglip")
_LAYER = re.compile(r"\.layers\.(\d{1,4})\.")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoder:
    """The options: the Hugging Face folder of an image encoder that was not trained, or how many heads one has that was."""

    folder: Path | None
    heads: int | None


@dataclass(frozen=True, slots=True)
class Given:
    """What is said of an image encoder beside the file: its config, its attention heads, or (`tensors`) all of it."""

    config: ModelConfig | None = None
    heads: int | None = None
    tensors: Dict[str, Tensor] = field(default_factory=dict)


def split(named: Dict[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The language model's entries, and those of the other parts, these as Megatron-Core models have them."""
    parts = {unnested(name): value for name, value in named.items() if nested(name)}
    return {name: value for name, value in named.items() if not nested(name)}, parts


def joined(
    stored: Stored, found: Dict[Rank, dict[str, Tensor]], given: Given, settings: Dict[str, object], where: str
) -> Stored:
    """The language model with the other parts that the ranks of its first stage hold."""
    found = _with_encoder(stored, found, given, where)
    towers = _configs(found[Rank()], given, where)
    config = replace(stored.config, towers=towers, **_sight(settings))
    return _as(f"{WHOLE}({_dialect(stored)},{_encoder(towers)})", config, stored, found)


def _sight(settings: Dict[str, object]) -> dict[str, Any]:
    """How its configuration says that the projector is given an image."""
    match settings:
        case {"mm_cfg": {"vision_encoder": {"vision_select_layer": int(layer), **others}}}:
            select = FEATURES.get(str(others.get("vision_select_feature", "patch")))
            return {"feature_layer": layer, "feature_select": select}
    return {}


def alone(
    found: Dict[Rank, dict[str, Tensor]], tp: int, pp: int, given: Given, extras: Extras, format_name: str, where: str
) -> Stored:
    """A file without a language model: its projector is the model, and has the image encoder for a part if that is there."""
    topology = even(0, tp=tp, pp=pp)
    absent = [rank for rank in topology.ranks() if rank not in found]
    if absent or len(found) > tp * pp:
        raise FormatError(
            where, f"the files of some ranks are missing: {', '.join(map(str, absent))} of tp {tp}, pp {pp}"
        )
    places = {rank: str(rank) for rank in found}
    start = Stored(
        format_name, load_mapping(ALONE), frozenset(), topology, _NOTHING, {rank: {} for rank in found}, places, extras
    )
    found = _with_encoder(start, found, given, where)
    towers = _configs(found[Rank()], given, where)
    if "projector" not in towers:
        raise FormatError(where, "holds neither a language model nor a projector: there is nothing to convert")
    projector = towers.pop("projector")
    return _as(f"{ALONE}({_encoder(towers)})", replace(projector, towers=towers), start, found)


_NOTHING = projector_config(0, 0, 0)
FEATURES = {"patch": "patch", "cls_patch": "full"}  # NeVA's word -> ours


def _as(name: str, config: ModelConfig, stored: Stored, found: Dict[Rank, dict[str, Tensor]]) -> Stored:
    ranks = {
        rank: {**tensors, **{Key(name): tensor for name, tensor in found.get(rank, {}).items()}}
        for rank, tensors in stored.ranks.items()
    }
    mapping, variant = detect([load_mapping(name)], config, stored.topology, ranks, stored.variant)
    return replace(stored, mapping=mapping, variant=variant, config=config, ranks=ranks)


def _dialect(stored: Stored) -> str:
    if stored.mapping.extends and not stored.mapping.name.startswith(("nemo-", "mcore-")):
        raise UsageError(
            f"--mapping {stored.mapping.name}: image models (NeVA) are read with the built-in mappings alone"
        )
    return stored.mapping.name


def _encoder(towers: Dict[str, ModelConfig]) -> str:
    """The dialect of the image encoder; where there is none any will do."""
    return towers["vision"].family if "vision" in towers else CLIP


def _with_encoder(
    stored: Stored, found: Dict[Rank, dict[str, Tensor]], given: Given, where: str
) -> dict[Rank, dict[str, Tensor]]:
    """With the encoder that was given on every tensor rank of the first stage, as NeMo has it in memory."""
    first = {
        rank: dict(found.get(rank, {}))
        for rank in stored.topology.ranks()
        if "embed" in stored.topology.stage(rank).roles
    }
    if given.tensors and any(name.startswith(ENCODER) for name in first[Rank()]):
        raise UsageError(f"{where} holds an image encoder of its own, which was trained: leave {ENCODER_FLAG} out")
    return {**found, **{rank: {**tensors, **given.tensors} for rank, tensors in first.items()}}


def _configs(tensors: Dict[str, Tensor], given: Given, where: str) -> dict[str, ModelConfig]:
    """Each part that is there."""
    rename = load_mapping(ALONE).rename
    shapes = {rename(name): tensor.shape for name, tensor in tensors.items()}
    parts = {
        prefix: {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for prefix in (ADAPTER, ENCODER)
    }
    towers = {"vision": _vision(parts[ENCODER], given, where)} if parts[ENCODER] else {}
    return towers | ({"projector": _projector(parts[ADAPTER], where)} if parts[ADAPTER] else {})


def _projector(shapes: Dict[str, Shape], where: str) -> ModelConfig:
    """One linear layer, or two with a GELU between them."""
    first, second, only = (
        shapes.get(f"mm_projector_adapter.mm_projector.{name}weight", ()) for name in ("0.", "2.", "")
    )
    if len(only) == 2:
        bias = "mm_projector_adapter.mm_projector.bias" in shapes
        return replace(projector_config(only[1], 0, only[0], mlp_bias=bias), linear=True)
    if len(first) == 2 and len(second) == 2:
        bias = "mm_projector_adapter.mm_projector.0.bias" in shapes
        return projector_config(first[1], first[0], second[0], mlp_bias=bias)
    listed = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
    raise FormatError(
        where, f"has a projector of a kind that is not supported: {listed}; known are linear and mlp2x_gelu"
    )


def _vision(shapes: Dict[str, Shape], given: Given, where: str) -> ModelConfig:
    """The encoder's config: as given, else with the sizes that its tensors have."""
    if given.config is not None:
        if given.heads not in (None, given.config.heads):
            raise ConfigError(
                f"{where}: {HEADS_FLAG} {given.heads}, but the config of the image encoder says {given.config.heads} attention heads; "
                "leave one of them out"
            )
        return given.config
    if not any(name.endswith("embeddings.patch_embedding.weight") for name in shapes):
        name = next(iter(shapes))
        raise FormatError(
            where,
            f"has an image encoder in names that are not those of transformers ({ENCODER}{name}), as with from_hf: false, "
            "which is not supported",
        )
    family = CLIP if _size(shapes, "pre_layrnorm.weight", 0) else SIGLIP
    hidden, channels, patch = (_size(shapes, "embeddings.patch_embedding.weight", axis) for axis in range(3))
    layers = 1 + max((int(m[1]) for name in shapes if (m := _LAYER.search(name))), default=-1)
    ffn = _size(shapes, "layers.0.mlp.fc1.weight", 0)
    heads = given.heads or KNOWN.get((hidden, layers, ffn), ("", 0))[1]
    if not heads or hidden % heads:
        said = f"{heads} do not divide its {hidden} entries" if heads else "nothing says it"
        raise ConfigError(
            f"{where}: how many attention heads the image encoder has cannot be measured, and {said}; "
            f"give {HEADS_FLAG} N, or --loader.config FOLDER (of the whole model in Hugging Face form)"
        )
    side = math.isqrt(_size(shapes, "embeddings.position_embedding.weight", 0) - (family == CLIP))
    raw: dict[str, Any] = {
        "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": ffn, "num_attention_heads": heads,
        "image_size": side * patch, "patch_size": patch, "num_channels": channels,
    }  # fmt: skip
    return read_config(raw, where, load_mapping(family), shapes)


def _size(shapes: Dict[str, Shape], ending: str, axis: int) -> int:
    shape: Shape = next((shape for name, shape in shapes.items() if name.endswith(ending)), ())
    return shape[axis] if len(shape) > axis else 0


def given(encoder: Encoder, whole: ModelConfig | None, request: Request) -> Given:
    """What is known of the image encoder: from the options, or from a config of the whole model in Hugging Face form."""
    if encoder.folder is None:
        return Given(whole.towers.get("vision") if whole else None, encoder.heads)
    folder = folder_of(encoder.folder)
    where = str(folder / CONFIG)
    raw = json_file.read(folder / CONFIG)
    mapping = family_of(raw, [m for m in families() if m.name in ENCODERS], where)
    tensors = read_weights(folder, request.check).tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = replace(read_config(own_section(raw, mapping), where, mapping, shapes), family=mapping.name)
    return Given(config, encoder.heads, {ENCODER + name: t for name, t in tensors.items() if not mapping.ignores(name)})


def of_ranks(contents: Sequence[RankContent]) -> tuple[list[RankContent], dict[str, dict[str, Tensor]]]:
    """The language model's part of every rank's file, and by file what it holds of the others."""
    halves = [split(content.chunks[0]) for content in contents]
    text = [replace(content, chunks=(half[0],)) for content, half in zip(contents, halves, strict=True)]
    return text, {content.where(): half[1] for content, half in zip(contents, halves, strict=True)}


def by_rank(contents: Sequence[RankContent], said: ArgsLayout, where: str) -> tuple[dict[Rank, RankContent], int, int]:
    """The files of a model without layers, tp and pp; a second number is always that of a pipeline stage."""
    found = {(tp, pp): content for content in contents for tp, pp in [(*content.file.numbers, 0)[:2]]}
    tp, pp = 1 + max(tp for tp, _ in found), 1 + max(pp for _, pp in found)
    if (said.tp, said.pp) not in ((None, None), (tp, pp)):
        raise FormatError(
            where, f"model_config.yaml says tp {said.tp}, pp {said.pp}, the files are those of {tp} and {pp}"
        )
    return {Rank(pp, tp, 0, 0, tp): content for (tp, pp), content in found.items()}, tp, pp


def language_of(mapping: str) -> str:
    """The dialect of the language model in a mapping of NeVA, or of one alone."""
    base, _, parts = mapping.removesuffix(")").partition("(")
    return parts.partition(",")[0] if base == WHOLE else mapping


def target_mapping(config: ModelConfig, language: str) -> tuple[Mapping, frozenset[str]]:
    """The mapping to write a model with. The encoder's names have one `vision_model.` in front, as transformers 4 makes them in NeMo."""
    encoder = _encoder(config.towers)
    mapping = load_mapping(f"{ALONE}({encoder})" if config.kind == "projector" else f"{WHOLE}({language},{encoder})")
    beginnings = (tag for group in mapping.variants for tag in group if prefix_of(tag) == "vision_model.")
    return mapping, frozenset(beginnings)
