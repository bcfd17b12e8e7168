"""transformers' LLaVA filled by hand from the parameters of the trainer's model on one process, to compare what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from ckptconv.trainer.config import Config

IMAGE = 255  # a byte that no caption has


def filled(config: Config, ours: dict[str, Tensor]) -> Any:
    m, v = config.model, config.vision
    assert v is not None
    vision = transformers.CLIPVisionConfig(
        hidden_size=v.hidden, intermediate_size=v.ffn, num_hidden_layers=v.layers, num_attention_heads=v.heads,
        image_size=v.image, patch_size=v.patch, layer_norm_eps=v.norm_eps, hidden_act="quick_gelu",
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=m.vocab, hidden_size=m.hidden, intermediate_size=m.ffn, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, rms_norm_eps=m.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta}, tie_word_embeddings=m.tied,
    )  # fmt: skip
    whole = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=m.tied,
    )
    model = transformers.LlavaForConditionalGeneration(whole).eval()
    unused = {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
    named = dict(_named(config, ours))
    missing, strange = model.load_state_dict(named, strict=False)
    assert (set(missing), strange) == (unused, [])
    return model


def _named(config: Config, ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    tower, text, vision = "model.vision_tower.", "model.language_model.", "vision_model."
    yield f"{tower}embeddings.class_embedding", ours[f"{vision}class_token"].flatten()
    yield f"{tower}embeddings.patch_embedding.weight", ours[f"{vision}conv1.weight"]
    yield f"{tower}embeddings.position_embedding.weight", ours[f"{vision}position_embeddings.weight"]
    yield f"{text}embed_tokens.weight", ours["language_model.embedding.word_embeddings.weight"]
    yield f"{text}norm.weight", ours["language_model.decoder.final_layernorm.weight"]
    yield "lm_head.weight", ours["language_model.output_layer.weight"]
    for kind in ("weight", "bias"):
        yield f"{tower}pre_layrnorm.{kind}", ours[f"{vision}ln_pre.{kind}"]
        for n in (1, 2):
            yield (
                f"model.multi_modal_projector.linear_{n}.{kind}",
                ours[f"vision_projection.encoder.linear_fc{n}.{kind}"],
            )
    m, v = config.model, config.vision
    assert v is not None
    for i in range(v.layers):
        here, there = f"{vision}decoder.layers.{i}.", f"{tower}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            yield f"{there}layer_norm1.{kind}", ours[f"{here}input_layernorm.{kind}"]
            yield f"{there}layer_norm2.{kind}", ours[f"{here}pre_mlp_layernorm.{kind}"]
            yield f"{there}self_attn.out_proj.{kind}", ours[f"{here}self_attention.linear_proj.{kind}"]
            yield f"{there}mlp.fc1.{kind}", ours[f"{here}mlp.linear_fc1.{kind}"]
            yield f"{there}mlp.fc2.{kind}", ours[f"{here}mlp.linear_fc2.{kind}"]
            for name, rows in _qkv(ours[f"{here}self_attention.linear_qkv.{kind}"], v.heads, 1):
                yield f"{there}self_attn.{name}_proj.{kind}", rows
    for i in range(m.layers):
        here, there = f"language_model.decoder.layers.{i}.", f"{text}layers.{i}."
        gate, up = ours[f"{here}mlp.linear_fc1.weight"].chunk(2)
        yield f"{there}input_layernorm.weight", ours[f"{here}input_layernorm.weight"]
        yield f"{there}post_attention_layernorm.weight", ours[f"{here}pre_mlp_layernorm.weight"]
        yield f"{there}self_attn.o_proj.weight", ours[f"{here}self_attention.linear_proj.weight"]
        yield f"{there}mlp.gate_proj.weight", gate
        yield f"{there}mlp.up_proj.weight", up
        yield f"{there}mlp.down_proj.weight", ours[f"{here}mlp.linear_fc2.weight"]
        for name, rows in _qkv(ours[f"{here}self_attention.linear_qkv.weight"], m.kv_heads, m.heads // m.kv_heads):
            yield f"{there}self_attn.{name}_proj.weight", rows


def _qkv(fused: Tensor, groups: int, queries: int) -> Iterator[tuple[str, Tensor]]:
    """Per group its queries, its key, its value: taken apart."""
    parts = fused.view(groups, queries + 2, -1, *fused.shape[1:]).split([queries, 1, 1], 1)  # type: ignore[no-untyped-call]
    for name, part in zip("qkv", parts, strict=True):
        yield name, part.reshape(-1, *fused.shape[1:])


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor], patches: int) -> Tensor:
    """Of the text, after the image."""
    images = torch.full((len(batch["tokens"]), patches), IMAGE)
    ids = torch.cat([images, batch["tokens"]], 1)
    found: Tensor = model(input_ids=ids, pixel_values=batch["images"]).logits
    return found
