"""What NeMo wrote, for tests: configurations, and the models they were made from."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from ckptconv.config import ModelConfig
from ckptconv.huggingface.family_config import family_of, read_config
from ckptconv.mapping_files import families
from ckptconv.nemo import model_config

GOLDEN = Path(__file__).parents[2] / "golden" / "nemo"
FOLDER, PIECES = GOLDEN / "configs", GOLDEN / "tokenizers"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SMALL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "mcore_gpt": True,
    "position_embedding_type": "rope",
}


def golden(case: str) -> dict[str, object]:
    """The file as PyYAML reads it."""
    table: dict[str, object] = yaml.safe_load((FOLDER / f"{case}.yaml").read_bytes())
    return table


def nemo_of(case: str) -> model_config.NemoConfig:
    return model_config.read((FOLDER / f"{case}.yaml").read_bytes(), f"{case}.yaml")


def small(**changes: object) -> model_config.NemoConfig:
    """A configuration with little in it."""
    return model_config.read(yaml.safe_dump({**SMALL, **changes}).encode(), "model_config.yaml")


def source_of(case: str) -> ModelConfig:
    """The Hugging Face model that an archive was made from; its rows before NeMo pads them."""
    name = "llama_" + ("gqa" if "gqa" in case or "neva" in case else "mha") + ("_v392" if "v392" in case else "")
    raw = json.loads((FOLDER / f"{name}.json").read_text())
    return read_config(raw, name, family_of(raw, families()))
