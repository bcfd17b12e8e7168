"""Tiny Hugging Face checkpoints with random weights, made without torch or transformers, for contracts and for anyone's tests."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ckptconv.bind import bind
from ckptconv.config import ModelConfig
from ckptconv.containers import safetensors
from ckptconv.dtypes import DTYPES, DType
from ckptconv.huggingface.family_config import family_of, read_config
from ckptconv.leaves import contiguous
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import families
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, even

WEIGHTS = "model.safetensors"
# Sizes are unlike each other, so that a swapped axis cannot pass unseen; 61 words divide by nothing, so every layout pads.
COMMON: dict[str, Any] = {
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 61,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama-tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "llama-bias": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "sliding_window": None,
    },
}
TOWERS: dict[str, dict[str, Any]] = {  # for formats that hold no language model
    "clip": {
        "architectures": ["CLIPVisionModelWithProjection"],
        "hidden_act": "quick_gelu",
        "hidden_size": 128,
        "image_size": 20,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "patch_size": 4,
        "projection_dim": 24,
    },
}


def config_of(model: str, **over: Any) -> dict[str, Any]:
    """The config.json of one of MODELS or TOWERS, with entries changed."""
    return {**(TOWERS[model] if model in TOWERS else {**COMMON, **MODELS[model]}), **over}


def write_hf(
    folder: Path,
    model: str = "llama",
    *,
    dtype: str = "bf16",
    seed: int = 2026,
    sparse: bool = False,
    mapping: Mapping | None = None,
    **over: Any,
) -> Path:
    """A folder with config.json and seeded weights; `over` changes its config. Gives the folder back.

    `sparse` leaves the weights a hole in the file: a checkpoint of any size for nothing, to plan with.
    `mapping` is the family's, if it is not one that is installed.
    """
    raw = config_of(model, torch_dtype=DTYPES[dtype].torch, **over)
    family = mapping or family_of(raw, families())
    config = read_config(raw, "config.json", family)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, shapes_of(family, config), DTYPES[dtype], seed=seed, sparse=sparse)
    (folder / "config.json").write_text(json.dumps(dict(sorted(raw.items())), indent=2) + "\n")
    return folder


def shapes_of(family: Mapping, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes a family stores a model under, in the first of each of its variants."""
    variant = frozenset(group[0] for group in family.variants)
    rows = bind(family, variant, config, even(config.layers), Rank())
    return {row.stored: row.shape for row in rows if not row.copy}


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: DType, *, seed: int = 2026, sparse: bool = False
) -> None:
    """A safetensors file of random tensors, each with values of its own."""
    layout = safetensors.layout(path.name, {n: _hollow(s, dtype) for n, s in shapes.items()}, {"format": "pt"})
    with path.open("wb") as file:
        file.truncate(layout.size)
        for segment in layout.segments:
            file.seek(segment.offset)
            if isinstance(segment.body, bytes):
                file.write(segment.body)
            elif not sparse:
                rng = np.random.default_rng([seed, *segment.name.encode()])
                values = rng.normal(0, 0.1, math.prod(shapes[segment.name]))
                file.write(values.astype(dtype.numpy).tobytes())


def _hollow(shape: tuple[int, ...], dtype: DType) -> Tensor:
    """A tensor of a file that need not exist: only its size is ever asked for."""
    return contiguous(Source("", 0, math.prod(shape) * dtype.itemsize), shape, dtype)
