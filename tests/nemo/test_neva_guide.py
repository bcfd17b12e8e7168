"""The commands of docs/guides/nemo-llava.md, run one after the other on a tiny vicuna, CLIP and LLaVA of transformers."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from ckptconv.testing.models import make_hf
from tests.cli.conftest import console
from tests.cli.helpers.console import Console
from tests.nemo.conftest import Archive
from tests.nemo.test_neva import PROJECTOR, TOKENIZER, llava, settings
from tests.unit.helpers.nemo import NEVA
from tools.golden_checks import hf_leaves
from tools.golden_nemo import members, torch_dist

__all__ = ["console", "llava"]
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "nemo-llava.md"
PLAIN = TOKENIZER.with_name("input.model")  # without NeVA's tokens


HEADS = ["--loader.vision-heads", "4"]  # NeVA's files do not say them, and this CLIP is none of those published


def commands() -> list[list[str]]:
    """As they stand, but for what a tiny model has otherwise."""
    blocks = re.findall(r"^```shell\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line.replace("32064", "384"))[1:] for block in blocks for line in block.splitlines()]
    return [[*words, *(HEADS if words[1] == "llava.nemo" else [])] for words in lines]


def test_the_recipe_from_vicuna_to_a_tuned_llava(
    llava: Path, archive: Archive, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_hf(
        tmp_path / "vicuna", "llama", vocab_size=384, hidden_size=64, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=176, num_hidden_layers=4,
    )  # fmt: skip
    shutil.copy(PLAIN, tmp_path / "vicuna" / "tokenizer.model")
    shutil.copytree(llava / "vision", tmp_path / "clip")
    shutil.copytree(llava / "whole", tmp_path / "llava")
    shutil.copy(archive(NEVA), tmp_path / "projector.nemo")
    console(*"convert llava tuned.nemo --saver nemo --saver.frozen-vision --saver.tokenizer".split(), TOKENIZER)
    assert len(commands()) == 9
    for words in commands():
        console(*words)
    assert (tmp_path / "neva.model").read_bytes() == TOKENIZER.read_bytes()
    trained, first = (torch_dist(members(tmp_path / name))[0] for name in ("projector.nemo", "first.nemo"))
    assert all(torch.equal(first[name], tensor) for name, tensor in trained.items())
    assert any("vision_encoder" in name for name in first)
    start = torch_dist(members(tmp_path / "start.nemo"))[0]
    assert start[f"{PROJECTOR}0.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert settings(tmp_path / "start.nemo")["mm_cfg"]["vision_encoder"]["freeze"] is True
    for name in ("llava-tuned", "llava-again"):
        assert hf_leaves(tmp_path / name) == hf_leaves(tmp_path / "llava")
