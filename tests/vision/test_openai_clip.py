"""OpenAI's files of CLIP: the state dict that Megatron's converter was given, and a TorchScript program that torch writes of it."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ckptconv.errors import ConfigError, FormatError
from ckptconv.pipeline import convert, load
from tests.vision.arrays import atoms

GOLDEN = Path(__file__).parents[1] / "golden" / "vlm" / "clip"
HEADS: dict[str, Any] = {"loader_options": {"heads": 16}}


def state_dict() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "src" / "model.safetensors")  # type: ignore[no-any-return]


def saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    torch.save(state, path)
    return path


class Tree(torch.nn.Module):
    """Modules that hold a state dict under its names, and a little code."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        below: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if rest:
                below.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, torch.nn.Parameter(tensor))
        for name, inner in below.items():
            self.add_module(name, Tree(inner))
        self.input_resolution = 16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@pytest.fixture
def program(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop TorchScript; published files remain
        torch.jit.script(Tree(state_dict())).save(tmp_path / "ViT.pt")  # type: ignore[no-untyped-call]
    return tmp_path / "ViT.pt"


def test_openai_names_and_transformers_names_are_the_same_tower(tmp_path: Path) -> None:
    """Two files of one model that we have not made: every atom must come out the same."""
    ours, theirs = atoms(saved(tmp_path / "clip.pt", state_dict()), **HEADS), atoms(GOLDEN / "src_hf")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


def test_sizes_are_those_of_the_config_json_beside_the_other() -> None:
    ours, theirs = (
        load(GOLDEN / "src/model.safetensors", loader="openai-clip", **HEADS).config,
        load(GOLDEN / "src_hf").config,
    )
    for name in (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "patch",
        "image",
        "max_positions",
        "projection",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("activation", "norm_eps", "norm", "class_tokens", "family"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_torchscript_program_holds_the_same(program: Path, tmp_path: Path) -> None:
    packed = [i.filename for i in zipfile.ZipFile(program).infolist() if i.compress_type]
    assert packed, "code is compressed, as in the published files"
    ours, plain = atoms(program, check=True, **HEADS), atoms(saved(tmp_path / "clip.pt", state_dict()), **HEADS)
    assert ours.keys() == plain.keys()
    assert all(np.array_equal(ours[name], plain[name]) for name in plain)


def test_code_of_a_program_is_never_looked_at(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        for item in old.infolist():
            data = b"no code at all" if "/code/" in item.filename else old.read(item)
            new.writestr(zipfile.ZipInfo(item.filename), data, item.compress_type)
    assert atoms(tmp_path / "other.pt", **HEADS).keys() == atoms(program, **HEADS).keys()


def test_only_code_may_be_compressed(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        for item in old.infolist():
            new.writestr(zipfile.ZipInfo(item.filename), old.read(item), zipfile.ZIP_DEFLATED)
    with pytest.raises(FormatError, match="is compressed"):
        load(tmp_path / "other.pt", loader="openai-clip")


def test_state_dict_is_written_for_torch_and_holds_the_visual_side(program: Path, tmp_path: Path) -> None:
    convert(program, tmp_path / "out.pt", saver="openai-clip", **HEADS)
    written, wanted = torch.load(tmp_path / "out.pt"), state_dict()
    assert set(written) == {name for name in wanted if name.startswith("visual.")}
    assert all(torch.equal(value, wanted[name]) for name, value in written.items())


def test_hugging_face_tower_becomes_openais(tmp_path: Path) -> None:
    convert(GOLDEN / "src_hf", tmp_path / "out.pt", saver="openai-clip")
    wanted = state_dict()
    for name, value in torch.load(tmp_path / "out.pt").items():
        assert torch.equal(value, wanted[name]), name


def test_heads_are_64_wide_unless_they_are_stated(tmp_path: Path) -> None:
    path = saved(tmp_path / "clip.pt", state_dict())
    assert load(path).config.heads == 1
    with pytest.raises(ConfigError, match=r"64 does not divide into 5 heads.*--loader\.heads"):
        load(path, loader_options={"heads": 5})


def test_residual_networks_are_refused_by_name(tmp_path: Path) -> None:
    state = {"visual.conv1.weight": torch.zeros(4, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    with pytest.raises(FormatError, match="ResNet"):
        load(saved(tmp_path / "clip.pt", state))


def test_other_towers_have_no_place_in_openais_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CLIP's vision tower, this is a model of hf-siglip"):
        convert(GOLDEN.parent / "siglip/src", tmp_path / "out.pt", saver="openai-clip")
