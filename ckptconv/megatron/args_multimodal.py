"""What `args` say of a model with a vision tower: the fields that Megatron-LM's multimodal example reads, written and read.

Its own start-up takes them from the command line; its converters (loader_llava) take them from the checkpoint. A language model's
args have fields of the same names with other meanings (img_h is 224, patch_dim 16 in all of them), so the source's are kept only
if they name a vision model.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict

from ckptconv.config import ModelConfig
from ckptconv.megatron.args_table import Field, Subject, Value

NAMED = "vision_model_type"
# Megatron's name of a vision model -> the family, attention heads (Megatron has no others), whether q and k are normed over all
TYPES = {
    "clip": ("hf-clip", 16, False),
    "siglip": ("hf-siglip", 16, False),
    "internvit": ("hf-internvit", 25, True),
    "internvit300M": ("hf-internvit", 16, False),
    "radio": ("hf-radio-h", 16, False),
    "radio-g": ("hf-radio-g", 24, False),
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
    """What Megatron calls this tower; None if it would build another by that name."""
    facts = (config.family, config.true_heads or config.heads, config.qk_norm_full)
    return next((name for name, known in TYPES.items() if known == facts), None)


def stated_tower(args: Dict[str, object]) -> tuple[str, int] | None:
    """The family and the attention heads of the vision model that args name."""
    known = TYPES.get(str(args.get(NAMED)))
    return known[:2] if known else None


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
    return config.raw.get("downsample_ratio") == 0.5


def drops_class_token(config: ModelConfig) -> bool:
    """As LLaVA, InternVL and NVLM do, unless the source's config says that the whole output of the tower is seen."""
    seen = config.raw.get("vision_feature_select_strategy", config.raw.get("mm_vision_select_feature"))
    return config.towers["vision"].class_tokens > 0 and seen not in ("full", "cls_patch")


def _of_tower(attribute: str) -> Value:
    return lambda s: getattr(s.config.towers["vision"], attribute)


def _raw(key: str, otherwise: object) -> Value:
    return lambda s: s.config.raw.get(key, otherwise)


def _tags(s: Subject) -> str:
    """The words that stand around an image: a model's own convention, which its kind tells."""
    return {"NVLM_D": "nvlm", "internvl_chat": "internvl", "internvl": "internvl"}.get(
        str(s.config.raw.get("model_type")), ""
    )


def _kept(name: str, otherwise: Value, origin: str) -> Field:
    """From the args of a multimodal source, else worked out."""

    def value(s: Subject) -> object:
        return s.carried.get(name, otherwise(s)) if NAMED in s.carried else otherwise(s)

    return Field(name, f"a multimodal source's args, else {origin}", value)


MULTIMODAL = (
    _kept("language_model_type", _language_type, "the one of Megatron's example that has these sizes (None: none)"),
    _kept(NAMED, lambda s: vision_type(s.config.towers["vision"]), "the tower's family and heads (None: no such type)"),
    Field(
        "vision_projection_type",
        "architecture: the projector's layers",
        lambda s: "affine" if "projector" in s.config.towers and s.config.towers["projector"].linear else "mlp",
    ),
    Field("img_h", "architecture: the tower's image", _of_tower("image")),
    Field("img_w", "architecture: the tower's image", _of_tower("image")),
    Field("patch_dim", "architecture: the tower's patch", _of_tower("patch")),
    _kept("pixel_shuffle", lambda s: shuffles(s.config), "whether the projector takes four patches at once"),
    _kept("disable_vision_class_token", lambda s: drops_class_token(s.config), "the Hugging Face config, else if there is one"),
    _kept("use_tiling", _raw("dynamic_image_size", False), "dynamic_image_size of the Hugging Face config, else False"),
    _kept("max_num_tiles", _raw("max_dynamic_patch", 1), "max_dynamic_patch of the Hugging Face config, else 1"),
    _kept("use_thumbnail", _raw("use_thumbnail", False), "use_thumbnail of the Hugging Face config, else False"),
    _kept("use_tile_tags", lambda s: _tags(s) == "nvlm", "whether it is NVLM-D"),
    _kept("image_tag_type", _tags, "what kind of model the Hugging Face config says this is"),
    _kept("tokenizer_prompt_format", lambda _: None, "None: no config states it"),
    _kept("decoder_seq_length", lambda s: s.config.max_positions, "architecture: max_positions"),
    _kept("freeze_LM", lambda _: False, "False: which parts have optimizer state"),
    _kept("freeze_ViT", lambda _: False, "False: which parts have optimizer state"),
    Field("special_tokens", "the word that an image takes the place of", lambda _: ["<image>"]),
    Field("use_te", "--saver.transformer-impl", lambda s: not s.local),
)  # fmt: skip
