"""What `args` say of a model with a vision tower: the fields that Megatron-LM's multimodal example reads, written and read.

Its own start-up takes them from the command line; its converters (loader_llava) take them from the checkpoint. A language model's
args have fields of the same names with other meanings (img_h is 224, patch_dim 16 in all of them), so the source's are kept only
if they name a vision model.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace

from ckptconv.config import ModelConfig
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_table import Field, Subject, Value

NAMED = "vision_model_type"
FAMILY, HEADS = "vision_family", "vision_attention_heads"


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower as the example builds it; `activation` is that of the models that Megatron's converters take."""

    family: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    activation: str
    qk_norm_full: bool = False


TYPES = {  # by Megatron's name
    "clip": Tower("hf-clip", 24, 1024, 16, 4096, "quick_gelu"),
    "siglip": Tower("hf-siglip", 27, 1152, 16, 4304, "gelu_pytorch_tanh"),
    "internvit": Tower("hf-internvit", 45, 3200, 25, 12800, "gelu", True),
    "internvit300M": Tower("hf-internvit", 24, 1024, 16, 4096, "gelu"),
    "radio": Tower("hf-radio-h", 32, 1280, 16, 5120, "gelu"),
    "radio-g": Tower("hf-radio-g", 40, 1536, 24, 4096, "silu"),
}
# (layers, hidden, ffn) -> the language models of which Megatron's example knows what their projector is like
LANGUAGE_TYPES = {
    (32, 4096, 14336): ("llama3_8b", "mistral_7b"),
    (60, 7168, 20480): ("yi-34b", "yi-34b"),
    (28, 3584, 18944): ("qwen2.5_7B", "qwen2.5_7B"),
    (80, 8192, 29568): ("qwen2.0_72B", "qwen2.0_72B"),
}
LARGE_VOCABULARY = 100_000  # Llama 3 and Mistral 7B have the same sizes, and vocabularies of 128 and 32 thousand


def vision_type(config: ModelConfig) -> str | None:
    """What Megatron calls this tower; None if it would build another by that name. Megatron's files do not tell the activation."""
    heads = config.true_heads or config.heads
    facts = Tower(
        config.family, config.layers, config.hidden, heads, config.ffn, config.activation, config.qk_norm_full
    )
    told = bool(config.raw)
    alike = (
        name
        for name, known in TYPES.items()
        if facts == (known if told else replace(known, activation=facts.activation))
    )
    return next(alike, None)


def stated_tower(args: Dict[str, object]) -> tuple[str, int] | None:
    """The family and the attention heads of the vision tower: as our args say them, else of the type that Megatron's name."""
    family, heads = args.get(FAMILY), args.get(HEADS)
    if isinstance(family, str) and isinstance(heads, int):
        return family, heads
    known = TYPES.get(str(args.get(NAMED)))
    return (known.family, known.heads) if known else None


def stated_sight(args: Dict[str, object], where: str) -> dict[str, object]:
    """How the model sees images, if args are of a multimodal one; its projector takes the last layer."""
    if NAMED not in args:
        return {}
    said: dict[str, object] = {"feature_layer": -1}
    for field, (name, kind) in _SIGHT.items():
        value = args.get(name)
        if value is not None and type(value) is not kind:
            raise ConfigError(f"{where}: args.{name} is {value!r}, expected a value of type {kind.__name__}")
        said[field] = value
    drops = args.get("disable_vision_class_token")
    return said | {"feature_select": None if drops is None else "patch" if drops else "full"}


_SIGHT: Dict[str, tuple[str, type]] = {
    "tiling": ("use_tiling", bool),
    "max_tiles": ("max_num_tiles", int),
    "thumbnail": ("use_thumbnail", bool),
    "tile_tags": ("use_tile_tags", bool),
    "image_tags": ("image_tag_type", str),
}


def sight_notes(config: ModelConfig) -> list[str]:
    """What Megatron's example computes otherwise than the model."""
    vision, who = config.towers.get("vision"), "Megatron-LM's multimodal example"
    if vision is None:
        return []
    out = []
    if vision_type(vision) is None:
        sizes = f"{vision.layers} layers, width {vision.hidden}, {vision.true_heads or vision.heads} heads, mlp {vision.ffn}"
        out.append(f"{who} has no --vision-model-type for this tower ({vision.family}: {sizes}, {vision.activation})")
    if config.feature_layer not in (None, -1, vision.layers):
        out.append(f"the projector takes layer {config.feature_layer} of the tower: {who} gives it the last")
    if config.shuffle == "columns":
        out.append(f"four patches are one and lie by columns (ps_version v1): {who} has them by rows")
    if config.min_tiles not in (None, 1):
        out.append(f"an image is at least {config.min_tiles} tiles: {who} has no least number")
    return out


def _language_type(s: Subject) -> str | None:
    c = s.config
    large, small = LANGUAGE_TYPES.get((c.layers, c.hidden, c.ffn), (None, None))
    if large == "llama3_8b" and c.rope is not None and c.rope.kind == "llama3":
        return "llama3.1_8b"
    return large if c.vocab_rows > LARGE_VOCABULARY else small


def shuffles(config: ModelConfig) -> bool:
    """Whether the projector takes four patches at once."""
    vision, projector = config.towers.get("vision"), config.towers.get("projector")
    if vision is not None and projector is not None:
        return projector.inputs == 4 * vision.hidden
    return config.shuffle is not None


def drops_class_token(config: ModelConfig) -> bool:
    """As LLaVA, InternVL and NVLM do, unless the whole output of the tower is seen."""
    return config.towers["vision"].class_tokens > 0 and config.feature_select != "full"


def _of_tower(attribute: str) -> Value:
    return lambda s: getattr(s.config.towers["vision"], attribute)


def _seen(field: str, otherwise: object) -> Value:
    def value(s: Subject) -> object:
        found = getattr(s.config, field)
        return otherwise if found is None else found

    return value


def _type(s: Subject) -> object:
    """A name that we do not know may be right."""
    carried = s.carried.get(NAMED)
    return vision_type(s.config.towers["vision"]) or (None if carried in TYPES else carried)


def _heads(s: Subject) -> object:
    tower = s.config.towers["vision"]
    return tower.true_heads or tower.heads


def _kept(name: str, otherwise: Value, origin: str) -> Field:
    """From the args of a multimodal source, else worked out."""

    def value(s: Subject) -> object:
        return s.carried.get(name, otherwise(s)) if NAMED in s.carried else otherwise(s)

    return Field(name, f"a multimodal source's args, else {origin}", value)


MULTIMODAL = (
    _kept("language_model_type", _language_type, "the one of Megatron's example that has these sizes (None: none)"),
    Field(NAMED, "the one by which Megatron's example builds this tower, else a name of the source's that we do not know", _type),
    Field(FAMILY, "our own: the tower's family", _of_tower("family")),
    Field(HEADS, "our own: the tower's attention heads, without dummy ones", _heads),
    Field(
        "vision_projection_type",
        "architecture: the projector's layers",
        lambda s: "affine" if "projector" in s.config.towers and s.config.towers["projector"].linear else "mlp",
    ),
    Field("img_h", "architecture: the tower's image", _of_tower("image")),
    Field("img_w", "architecture: the tower's image", _of_tower("image")),
    Field("patch_dim", "architecture: the tower's patch", _of_tower("patch")),
    _kept("pixel_shuffle", lambda s: shuffles(s.config), "whether the projector takes four patches at once"),
    _kept("disable_vision_class_token", lambda s: drops_class_token(s.config), "whether the class token is not seen"),
    _kept("use_tiling", _seen("tiling", False), "tiling, else False"),
    _kept("max_num_tiles", _seen("max_tiles", 1), "max_tiles, else 1"),
    _kept("use_thumbnail", _seen("thumbnail", False), "thumbnail, else False"),
    _kept("use_tile_tags", _seen("tile_tags", False), "tile_tags, else False"),
    _kept("image_tag_type", _seen("image_tags", ""), "image_tags, else none"),
    _kept("tokenizer_prompt_format", lambda _: None, "None: no config states it"),
    _kept("decoder_seq_length", lambda s: s.config.max_positions, "architecture: max_positions"),
    _kept("freeze_LM", lambda _: False, "False: which parts have optimizer state"),
    _kept("freeze_ViT", lambda _: False, "False: which parts have optimizer state"),
    Field("special_tokens", "the word that an image takes the place of", lambda _: ["<image>"]),
    Field("use_te", "--saver.transformer-impl", lambda s: not s.local),
)  # fmt: skip
