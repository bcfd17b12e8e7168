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
    import torch
    import transformers

    chosen = KINDS[kind]
    config = getattr(transformers, f"{chosen.model}Config")(**{**COMMON, **chosen.config, **over})
    model = getattr(transformers, f"{chosen.model}ForCausalLM")(config).eval().float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * (0.2 if name.endswith("bias") else 0.06))
    return model


def token_ids(rows: int = 2, length: int = 17, vocab: int = 131, seed: int = 7) -> NDArray[np.int64]:
    """The same sentences for everybody."""
    return np.random.default_rng(seed).integers(0, vocab, (rows, length))


def hf_logits(folder: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """What transformers computes in fp32 from a folder; a weight it finds missing, left over or reshaped is an error."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise ValueError(f"transformers does not load {folder.name} cleanly: {wrong}")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.float().numpy()  # type: ignore[no-any-return]
