"""Tiny Hugging Face checkpoints that transformers itself wrote, made once per run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 61, "max_position_embeddings": 64, "dtype": "float32",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama-tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "Mistral": {"head_dim": 16},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mixtral": {"num_local_experts": 4},
}


def make(name: str, folder: Path, **saving: Any) -> Any:
    """A tiny model of transformers, saved by it."""
    kind = name.partition("-")[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **FAMILIES[name])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():  # biases and norms start as constants, which would hide a mix-up
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3)
    model.save_pretrained(folder, **saving)
    return model


@pytest.fixture(scope="session")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as one file, and one of them in shards."""
    root = tmp_path_factory.mktemp("hf")
    for name in FAMILIES:
        make(name, root / name)
    make("Llama", root / "sharded", max_shard_size="30KB")
    make("Mixtral", root / "fused", save_original_format=False)
    return {p.name: p for p in root.iterdir()}


@pytest.fixture
def hf_copy(hf_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def one(name: str) -> Path:
        return Path(shutil.copytree(hf_folders[name], tmp_path / "src" / name))

    return one
