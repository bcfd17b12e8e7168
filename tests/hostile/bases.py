"""The clean checkpoints that are damaged: one small model in every form, and others to mix it with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ckptconv import ExecuteOptions, convert
from ckptconv.containers import safetensors
from ckptconv.testing.checkpoints import write_hf

QUICK = ExecuteOptions(workers=1, durable=False)


def to_shards(size: str) -> dict[str, Any]:
    return {"saver": "hf", "saver_options": {"max_shard_size": size}}


# name -> (from which, how)
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "shards": ("hf", to_shards("32KB")),
    "shards other": ("hf other", to_shards("32KB")),
    "shards wide": ("hf wide", to_shards("36KB")),
    "mcore": ("hf", {"saver": "mcore", "tp": 2, "pp": 2}),
    "mcore other": ("hf other", {"saver": "mcore", "tp": 2, "pp": 2}),
    "mcore wide": ("hf wide", {"saver": "mcore", "tp": 2, "pp": 2}),
    "mcore fp32": ("hf", {"saver": "mcore", "tp": 2, "pp": 2, "dtype": "fp32"}),
    "mcore tp4": ("hf", {"saver": "mcore", "tp": 4, "pp": 2}),
    "mcore tp2": ("hf", {"saver": "mcore", "tp": 2}),
    "mcore vpp2": ("hf", {"saver": "mcore", "tp": 2, "pp": 2, "vpp": 2}),
    "moe": ("hf moe", {"saver": "mcore", "tp": 2, "ep": 2}),
    "legacy": ("hf", {"saver": "legacy", "tp": 2}),
    "legacy other": ("hf other", {"saver": "legacy", "tp": 2}),
}


def make_all(root: Path) -> dict[str, Path]:
    """Every clean checkpoint by name."""
    made = {
        "hf": write_hf(root / "hf", num_hidden_layers=4),
        "hf other": write_hf(root / "hf other", seed=7, num_hidden_layers=4),
        "hf wide": write_hf(root / "hf wide", num_hidden_layers=4, intermediate_size=64),
        "hf moe": write_hf(root / "hf moe", "mixtral", num_hidden_layers=2),
    }
    for folder in made.values():
        (folder / "tokenizer.json").write_text("{}")
    for name, (start, how) in MADE.items():
        convert(made[start], root / name, execute_options=QUICK, **how)
        made[name] = root / name
    for name, options in {"bin": {}, "old bin": {"_use_new_zipfile_serialization": False}}.items():
        made[name] = _bin(made["hf"], root / name, **options)
    return made


def _bin(hf: Path, folder: Path, **options: Any) -> Path:
    """The same weights in a pytorch_model.bin, as torch saves it."""
    shutil.copytree(hf, folder)
    (folder / "model.safetensors").unlink()
    tensors = safetensors.read(hf / "model.safetensors").tensors
    state = {name: torch.tensor(t.numpy().astype("float32")).bfloat16() for name, t in tensors.items()}
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder
