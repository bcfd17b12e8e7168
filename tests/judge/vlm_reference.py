"""What transformers computes for towers and LLaVA models: the other side of the judge's comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from ckptconv.testing import models
from ckptconv.testing.models import make_hf, make_tower
from tests.judge.vlm import IMAGE_TOKEN

Array = NDArray[np.float32]
IMAGE = 130  # the token that stands for an image in transformers' ids
TOWERS = {"clip": "CLIP", "siglip": "Siglip"}


def hf_tower(folder: Path, kind: str, pixels: torch.Tensor) -> Array:
    with torch.no_grad():
        model = getattr(transformers, kind).from_pretrained(folder).eval()
        return model(pixel_values=pixels).last_hidden_state.numpy()  # type: ignore[no-any-return]


def make_llava(folder: Path, kind: str) -> Path:
    """`lm`, `vision` and `whole`: transformers' LLaVA with the same weights in it, and a random projector.

    SigLIP is without its pooling head, which LLaVA does not use.
    """
    over = {"vision_use_head": False} if kind == "siglip" else {}
    make_hf(folder / "lm", "llama")
    make_tower(folder / "vision", f"{TOWERS[kind]}VisionModel", **over)
    lm = transformers.LlamaForCausalLM.from_pretrained(folder / "lm")
    tower = getattr(transformers, f"{TOWERS[kind]}VisionModel").from_pretrained(folder / "vision")
    config = transformers.LlavaConfig(
        vision_config=tower.config, text_config=lm.config, image_token_index=IMAGE, vision_feature_layer=-1,
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    whole = models._randomized(transformers.LlavaForConditionalGeneration(config), 3)
    whole.model.vision_tower.load_state_dict(tower.state_dict())
    whole.model.language_model.load_state_dict(lm.model.state_dict())
    whole.lm_head.load_state_dict(lm.lm_head.state_dict())
    whole.save_pretrained(folder / "whole")
    return folder


def hf_llava(folder: Path, ids: torch.Tensor, pixels: torch.Tensor, select: str) -> Array:
    """Logits of every position, an image taking as many as the tower gives. Each row has one IMAGE_TOKEN.

    Behind SigLIP's last layer Megatron-Core has its last norm, where LLaVA takes what comes before it; here it takes what
    comes after, which is transformers' own `last_hidden_state`. CLIP has no norm there in either.
    """
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    model.model.vision_tower.register_forward_hook(_last_is_last)
    tower = model.config.vision_config
    count = (tower.image_size // tower.patch_size) ** 2 + (tower.model_type.startswith("clip") and select == "full")
    rows = [
        [n for token in row for n in ([IMAGE] * count if token == IMAGE_TOKEN else [token])] for row in ids.tolist()
    ]
    with torch.no_grad():
        found = model(input_ids=torch.tensor(rows), pixel_values=pixels, vision_feature_select_strategy=select)
    return found.logits.numpy()  # type: ignore[no-any-return]


def _last_is_last(tower: Any, given: Any, out: Any) -> Any:
    out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
    return out


def hf_internvit(folder: Path, pixels: torch.Tensor) -> Array:
    """transformers' own InternVL tower, which is InternViT under other names, filled from InternViT's published ones."""
    config = transformers.InternVLVisionConfig(
        hidden_size=100, intermediate_size=160, num_hidden_layers=2, num_attention_heads=25, image_size=[16, 16],
        patch_size=[4, 4], use_qk_norm=True, norm_type="rms_norm", attention_bias=False, hidden_act="gelu", layer_norm_eps=1e-6,
        use_mean_pooling=True,
    )  # fmt: skip
    model = transformers.InternVLVisionModel(config).float().eval()
    missing, strange = model.load_state_dict(dict(_internvl(load_file(folder / "model.safetensors"))), strict=False)
    assert (missing, strange) == ([], [])
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state.numpy()  # type: ignore[no-any-return]


NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder.layers": "encoder.layer",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "attn.proj": "attention.projection_layer",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}


def _internvl(published: dict[str, torch.Tensor]) -> Any:
    for name, tensor in published.items():
        if name.endswith("attn.qkv.weight"):
            base = name.replace("encoder.layers", "encoder.layer").replace("attn.qkv.weight", "attention.")
            yield from zip((f"{base}{n}_proj.weight" for n in "qkv"), tensor.float().chunk(3), strict=True)
            continue
        for old, new in NAMES.items():
            name = name.replace(old, new)
        yield name, tensor.float()
