"""The commands of the guides to multimodal models, run as they stand on models of their shapes but tiny."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ckptconv.pipeline import convert
from ckptconv.testing.models import make_hf, make_tower
from tests.cli.conftest import console as console
from tests.cli.helpers.console import Console

ROOT = Path(__file__).parents[2]
GUIDES, GOLDEN = ROOT / "docs" / "guides", ROOT / "tests" / "golden" / "vlm"
CLIP = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_hidden_layers": 2}
WEIGHTS = "model.safetensors"


def run(guide: str, console: Callable[..., Any], instead: dict[str, str] | None = None) -> list[list[str]]:
    """Every command of the guide, one after the other; `instead` has what tiny models need in place of a word."""
    blocks = re.findall(r"^```shell\n(.*?)^```$", (GUIDES / guide).read_text(), re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    for name, *words in commands:
        assert name == "ckptconv"
        console(*((instead or {}).get(word, word) for word in words))
    return commands


def rank(folder: str, name: str) -> dict[str, Any]:
    (path,) = Path(folder).glob(f"iter_*/mp_rank_{name}/model_optim_rng.pt")
    return torch.load(path, weights_only=False)["model"]  # type: ignore[no-any-return]


def test_mistral_and_clip(console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_hf(tmp_path / "Mistral-7B-Instruct-v0.3", "mistral", num_key_value_heads=4, vocab_size=512)
    make_hf(tmp_path / "vicuna-7b-v1.5", "llama", vocab_size=320)
    clip = make_tower(tmp_path / "clip-vit-large-patch14-336", "CLIPVisionModelWithProjection", **CLIP)
    convert(clip, tmp_path / "ViT-L-14-336px.pt", saver="openai-clip")
    shapes = {"0.weight": (64, 256), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save({f"model.mm_projector.{n}": torch.rand(s) for n, s in shapes.items()}, "mm_projector.bin")
    assert len(run("llava-mistral-clip.md", console)) == 12

    joined = rank("mistral-clip-tp4", "03")
    assert not [name for name in joined if "projection" in name]
    for part, folder in (("language_model.", "mistral-tp4"), ("vision_model.", "clip-tp4")):
        for name, value in rank(folder, "03").items():
            assert value is None or torch.equal(value, joined[part + name]), name
    start, trained = (load_file(Path(folder) / WEIGHTS) for folder in ("llava-start", "llava-mistral"))
    assert start.keys() == trained.keys()
    assert [n for n in start if not np.array_equal(start[n], trained[n])] == [
        f"multi_modal_projector.linear_{i}.weight" for i in (1, 2)
    ]
    made, lm = (load_file(Path(folder) / WEIGHTS) for folder in ("llava-1.5-7b", "vicuna-again"))
    assert np.array_equal(made["language_model.lm_head.weight"], lm["lm_head.weight"])
    assert lm["lm_head.weight"].shape == (32064, 64)
    trained_alone, again = (torch.load(path) for path in ("mm_projector.bin", "projector.bin"))
    assert list(again) == list(trained_alone)
    assert all(torch.equal(again[name], value) for name, value in trained_alone.items())


def make_parts_of_nvlm(place: Path) -> None:
    yi: dict[str, Any] = {"num_attention_heads": 56, "num_key_value_heads": 8, "hidden_size": 112, "vocab_size": 128}
    make_hf(place / "Yi-34B", "llama", **yi)
    shape: dict[str, Any] = {
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "hidden_size": 32,
        "num_hidden_layers": 8,
    }
    make_hf(place / "Qwen2-72B-Instruct", "qwen2", dtype="bfloat16", **shape)
    shutil.copytree(GOLDEN / "internvit" / "src", place / "InternViT-6B-448px-V1-5")


def test_nvlm(console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_parts_of_nvlm(tmp_path)
    assert len(run("nvlm.md", console, {"17,21,21,21": "1,3,2,2"})) == 12  # 80 layers would take a minute

    heads = [
        rank("nvlm-uneven", f"{tp:02d}_000")["vision_model.decoder.layers.0.self_attention.linear_qkv.weight"]
        for tp in (6, 7)
    ]
    assert [int((part != 0).any(1).sum()) for part in heads] == [12, 0], (
        "one real head of four entries on rank 6, none on 7"
    )
    layers = [
        sum(
            name.endswith("linear_fc2.weight") and name.startswith("language")
            for name in rank("nvlm-uneven", f"00_{pp:03d}")
        )
        for pp in range(4)
    ]
    assert layers == [1, 3, 2, 2]
    assert not [name for name in rank("nvlm-uneven", "00_003") if name.startswith("vision")]
    weights, table = load_file(Path("NVLM-D") / WEIGHTS), json.loads(Path("NVLM-D/config.json").read_text())
    tower = load_file(GOLDEN / "internvit" / "src" / WEIGHTS)["encoder.layers.1.attn.qkv.weight"]
    qkv = weights["vision_model.encoder.layers.1.attn.qkv.weight"].reshape(3, 32, 4, 100)
    assert np.array_equal(qkv[:, :25].reshape(300, 100), tower)
    assert not qkv[:, 25:].any()
    assert (table["model_type"], table["downsample_ratio"], table["vision_config"]["num_attention_heads"]) == (
        "NVLM_D",
        0.5,
        25,
    )
    assert table["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
