"""Tiny random models made with transformers, one per architecture ckptconv knows, to convert in tests and to compare logits with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """A model class of transformers and what its config says beyond `COMMON`."""

    model: str
    config: dict[str, Any] = field(default_factory=dict)


# Sizes are unlike each other wherever an architecture allows it, so that a swapped axis cannot pass unseen; 131 words
# divide by nothing, so that every layout pads.
COMMON: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 4,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWERS = {  # class of transformers -> what its config says
    "CLIPVisionModel": VISION,
    "CLIPVisionModelWithProjection": {**VISION, "projection_dim": 24},
    "CLIPModel": {"vision_config": VISION, "text_config": TEXT, "projection_dim": 24},
    "SiglipVisionModel": VISION,
    "SiglipModel": {"vision_config": VISION, "text_config": TEXT},
}
JOINED = {**COMMON, "hidden_size": 48, "head_dim": 16}
WHOLE: dict[str, dict[str, Any]] = {  # a vision tower, a projector and a language model: kind -> what its config says
    "Llava": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {"model_type": "llama", **JOINED},
        "image_token_index": 130,
    },
    "LlavaNext": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {"model_type": "mistral", **JOINED, "sliding_window": None},
        "image_token_index": 130,
        "image_grid_pinpoints": [[20, 40], [40, 20]],
    },
    "InternVL": {
        "vision_config": {**VISION, "image_size": [24, 24], "patch_size": [4, 4], "use_qk_norm": True},
        "text_config": {"model_type": "qwen2", **JOINED},
        "image_token_id": 130,
        "tie_word_embeddings": False,
    },
}
KINDS = {
    "llama": Kind("Llama"),
    "llama-mha": Kind("Llama", {"num_key_value_heads": 4}),
    "llama-tied": Kind("Llama", {"tie_word_embeddings": True}),
    "llama-bias": Kind("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": Kind("Llama", {"head_dim": 24}),
    "llama3": Kind("Llama", {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 131072}),
    "mistral": Kind("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": Kind("Qwen2"),
    "qwen2-tied": Kind("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": Kind("Qwen3", {"head_dim": 32}),
    "mixtral": Kind("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
}


def make_hf(folder: Path, kind: str, *, dtype: str = "float32", seed: int = 1234, **over: Any) -> Path:
    """Save a seeded model of a kind; `over` changes its config. Gives the folder back."""
    import torch

    model = make_model(kind, seed=seed, **over)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_model(kind: str, *, seed: int = 1234, **over: Any) -> Any:
    """Every parameter random, norms and biases too: two tensors swapped always show."""
    import transformers

    chosen = KINDS[kind]
    config = getattr(transformers, f"{chosen.model}Config")(**{**COMMON, **chosen.config, **over})
    return _randomized(getattr(transformers, f"{chosen.model}ForCausalLM")(config), seed)


def make_tower(folder: Path, kind: str, *, seed: int = 1234, **over: Any) -> Path:
    """Save a seeded vision tower, or a model around one: one of `TOWERS`. Gives the folder back."""
    import transformers

    model_class = getattr(transformers, kind)
    model = _randomized(model_class(model_class.config_class(**{**TOWERS[kind], **over})), seed)
    model.save_pretrained(folder)
    return folder


def make_whole(folder: Path, kind: str, *, seed: int = 1234, **over: Any) -> Path:
    """Save a seeded model of several parts: one of `WHOLE`. Gives the folder back."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**WHOLE[kind], **over})
    _randomized(getattr(transformers, f"{kind}ForConditionalGeneration")(config), seed).save_pretrained(folder)
    return folder


def whole_logits(folder: Path, kind: str) -> NDArray[np.float32]:
    """The logits of an image and a sentence behind it, which transformers computes in fp32 from a folder."""
    import torch
    import transformers

    model = _loaded(getattr(transformers, f"{kind}ForConditionalGeneration"), folder)
    side, more, tokens = (24, {}, 9) if kind == "InternVL" else (20, {}, 25)
    pixels = torch.from_numpy(images(side)[:1])
    if kind == "LlavaNext":  # two tiles and the whole, with an end of each row
        pixels, more, tokens = (
            pixels.repeat(1, 3, 1, 1, 1).reshape(1, 3, 3, side, side),
            {"image_sizes": torch.tensor([[20, 40]])},
            80,
        )
    ids = torch.cat([torch.full((1, tokens), 130), torch.from_numpy(token_ids(1, vocab=130))], 1)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, **more).logits.numpy()  # type: ignore[no-any-return]


def _randomized(model: Any, seed: int) -> Any:
    import torch

    model = model.eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.2 if name.endswith("bias") else 0.06))
    return model


def token_ids(rows: int = 2, length: int = 17, vocab: int = 131, seed: int = 7) -> NDArray[np.int64]:
    """The same sentences for everybody."""
    return np.random.default_rng(seed).integers(0, vocab, (rows, length))


def images(size: int = 20, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(2, 3, size, size)).astype(np.float32)


def hf_hidden(folder: Path, kind: str) -> NDArray[np.float32]:
    """The last hidden state of the same images that transformers' class computes from a folder, which must fit it wholly."""
    import torch
    import transformers

    model = _loaded(getattr(transformers, kind), folder)
    tower = model.vision_model if "vision_config" in TOWERS[kind] else model
    with torch.no_grad():
        return tower(pixel_values=torch.from_numpy(images())).last_hidden_state.numpy()  # type: ignore[no-any-return]


def _loaded(model_class: Any, folder: Path) -> Any:
    """A weight that transformers finds missing, left over or reshaped is an error."""
    import torch

    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if wrong := {key: value for key, value in info.items() if value}:
        raise ValueError(f"transformers does not load {folder.name} cleanly: {wrong}")
    return model.eval()


def hf_logits(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """What transformers computes in fp32 from a folder; a weight it finds missing, left over or reshaped is an error."""
    import torch
    import transformers

    model = _loaded(transformers.AutoModelForCausalLM, folder)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()  # type: ignore[no-any-return]
