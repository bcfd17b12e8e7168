"""Megatron-Core's vision towers and LLaVAModel of one rank, built from Hugging Face configs, and what they compute.

Its layer specification for towers on its own modules has a causal mask, which no tower was trained with; the multimodal training
code says no mask, and so do we. Its default norm in front of and behind a tower is TransformerEngine's, and where that is absent
torch's, which it cannot build; it gets the norm that Megatron-Core itself takes in the layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tests.judge.models import _config, _layer
from tests.judge.ranks import Layout
from tests.judge.spec import Config, Spec

IMAGE_TOKEN = -200  # Megatron-Core's own default
ENGINE_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
SUBTYPES = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "intern_vit_6b": "internvit"}


@dataclass(frozen=True)
class Vision:
    """What Megatron-Core must be told of a tower."""

    subtype: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    image: int
    patch: int

    @property
    def class_tokens(self) -> int:
        return 0 if self.subtype == "siglip" else 1


@dataclass(frozen=True)
class Whole:
    """A LLaVA model: its parts, and whether the language model sees the class token."""

    language: Spec
    vision: Vision
    sees_class_token: bool


def vision_from_hf(config: Config, tp: int) -> Vision:
    """InternViT's heads are filled up with dummy ones until `tp` divides them."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Vision(
        SUBTYPES[config["model_type"]],
        config["num_hidden_layers"],
        hidden,
        -(-heads // tp) * tp,
        hidden // heads,
        config["intermediate_size"],
        config["layer_norm_eps"],
        config["image_size"],
        config["patch_size"],
    )


def build_tower(vision: Vision, layout: Layout) -> Any:
    """This rank's tower, weights not yet loaded (NaN)."""
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel

    return _blank(_tower_class(CLIPViTModel)(_vision_config(vision, layout), vision_layer(vision), **_image(vision)))


def build_llava(whole: Whole, layout: Layout, *, engine_keys: bool = False) -> Any:
    """This rank's LLaVAModel; tower and projector on the first stage alone, as in Megatron's multimodal training.

    `engine_keys`: a distributed checkpoint calls the tower's norms as modules of TransformerEngine do, in which they are fused.
    Megatron-Core's specification of language models on its own modules says the same of itself.
    """
    import megatron.core.models.multimodal.llava_model as home
    from megatron.core import parallel_state as ps
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel

    home.CLIPViTModel = _tower_class(CLIPViTModel)
    spec, vision = whole.language, whole.vision
    first = ps.is_pipeline_first_stage()
    image, layer = _image(vision), vision_layer(vision)
    if engine_keys:
        layer.submodules.sharded_state_dict_keys_map = ENGINE_KEYS
    return _blank(
        home.LLaVAModel(
            _config(spec, layout),
            _layer(spec),
            language_vocab_size=spec.vocab_rows,
            language_max_sequence_length=spec.positions,
            vision_transformer_config=_vision_config(vision, layout),
            vision_transformer_layer_spec=layer,
            drop_vision_class_token=bool(vision.class_tokens) and not whole.sees_class_token,
            vision_projection_config=_projector_config(spec, layout),
            vision_projection_layer_spec=_mlp(),
            language_position_embedding_type="rope",
            language_rotary_base=spec.rotary_base,
            pre_process=first,
            post_process=ps.is_pipeline_last_stage(),
            add_encoder=first,
            image_token_index=IMAGE_TOKEN,
            **{name: image[name] for name in ("img_h", "img_w", "patch_dim")},
        )
    )


def _blank(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    return model.eval()


def _tower_class(model: type) -> Any:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return partial(model, ln_pre_impl=WrappedTorchNorm, ln_post_impl=WrappedTorchNorm)


def _image(vision: Vision) -> dict[str, Any]:
    return {
        "img_h": vision.image,
        "img_w": vision.image,
        "patch_dim": vision.patch,
        "model_subtype": vision.subtype,
        "class_token_len": vision.class_tokens,
        "add_class_token": vision.class_tokens > 0,
    }


def vision_layer(vision: Vision) -> Any:
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.enums import AttnMaskType

    if vision.subtype == "internvit":
        from tests.judge.vlm_internvit import internvit_layer

        return internvit_layer()
    layer = get_vit_layer_with_local_spec()
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    return layer


def _vision_config(vision: Vision, layout: Layout) -> Any:
    """Biases everywhere, LayerNorm, no rotary embedding; the base of what is the same comes from the language models' judge."""
    from megatron.core.activations import fast_gelu, quick_gelu

    config = _plain_config(layout, vision.layers, vision.hidden, vision.heads, vision.head_dim, vision.ffn)
    config.layernorm_epsilon = vision.norm_eps
    config.activation_func = {"clip": quick_gelu, "siglip": fast_gelu, "internvit": torch.nn.functional.gelu}[
        vision.subtype
    ]
    config.normalization = "RMSNorm" if vision.subtype == "internvit" else "LayerNorm"
    config.vision_model_type = vision.subtype
    return config


def _projector_config(spec: Spec, layout: Layout) -> Any:
    """Two layers with biases and a GELU between, as LLaVA 1.5 has them."""
    return _plain_config(layout, 1, spec.hidden, spec.heads, spec.head_dim, spec.hidden)


def _plain_config(layout: Layout, layers: int, hidden: int, heads: int, head_dim: int, ffn: int) -> Any:
    """A stack that is neither gated nor cut into stages, and has biases."""
    spec = Spec(
        layers=layers, hidden=hidden, heads=heads, groups=heads, head_dim=head_dim, ffn=ffn, vocab_rows=0, positions=0, norm_eps=1e-5,
        rotary_base=10000, rope_factor=None, tied=False, bias=True, qkv_bias=True, qk_norm=False, experts=None, top_k=0,
    )  # fmt: skip
    config = _config(spec, replace(layout, pp=1, vpp=None))
    config.gated_linear_unit, config.activation_func = False, torch.nn.functional.gelu
    return config


def _mlp() -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def forward(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """What LLaVAModel gives for a text with one IMAGE_TOKEN in each row, and an image for each: its part of the vocabulary."""
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    out, _ = model(pixels, ids, positions, None)
    return out  # type: ignore[no-any-return]
