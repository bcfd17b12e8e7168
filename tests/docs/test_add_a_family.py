"""docs/add-a-family.md, done as it says: a family of mapping files alone, given by file and as a plug-in; tensors added and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptconv.checkpoint import Key
from ckptconv.containers import safetensors
from ckptconv.dtypes import BF16
from ckptconv.formats import Request
from ckptconv.formats.mcore import Mcore, McoreLoad
from ckptconv.huggingface.family_config import read_config
from ckptconv.mapping_files import load_mapping, load_mapping_file
from ckptconv.testing.checkpoints import WEIGHTS, config_of, shapes_of, write_hf, write_tensors
from ckptconv.topology import Rank

Run = Callable[..., Any]
SANDWICH: dict[str, Any] = {"model_type": "sandwich", "architectures": ["SandwichForCausalLM"], "ffn_dim": 48}
LAYOUT = ("--saver", "mcore", "--tp", "2", "--pp", "2")


@pytest.fixture(scope="module")
def project(doc_files: Callable[[str, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doc_files("add-a-family.md", tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def sandwich(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    mapping = load_mapping_file(project / "ckptconv_sandwich" / "hf-sandwich.toml")
    return write_hf(tmp_path_factory.mktemp("sandwich") / "hf", "llama", mapping=mapping, **SANDWICH)


def with_scales(folder: Path) -> Path:
    """A Llama with one tensor in every layer that no mapping knows."""
    write_hf(folder)
    family, raw = load_mapping("hf-llama"), config_of("llama")
    shapes = shapes_of(family, read_config(raw, "config.json", family))
    extra = {f"model.layers.{i}.self_attn.head_scale.weight": (48,) for i in range(4)}
    write_tensors(folder / WEIGHTS, {**shapes, **extra}, BF16)
    return folder


def given(project: Path, *names: str) -> list[str]:
    return [word for name in names for word in ("--mapping", str(project / name))]


def test_family_that_is_not_known_is_refused(sandwich: Path, tmp_path: Path, run: Run) -> None:
    shown = run("ckptconv", "convert", sandwich, tmp_path / "out", *LAYOUT, code=1).stderr
    assert "model_type is 'sandwich'" in shown
    assert not (tmp_path / "out").exists()


def test_family_given_by_file_goes_to_megatron_and_back(
    project: Path, sandwich: Path, tmp_path: Path, run: Run
) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    both = given(project, "ckptconv_sandwich/hf-sandwich.toml", "ckptconv_sandwich/mcore-sandwich.toml")
    run("ckptconv", "convert", sandwich, there, *LAYOUT, *both)
    run("ckptconv", "convert", there, back, "--saver", "hf", *both)
    for name in (WEIGHTS, "config.json"):
        assert (back / name).read_bytes() == (sandwich / name).read_bytes()


def test_dialect_without_the_tensor_refuses_with_all_of_them(
    project: Path, sandwich: Path, tmp_path: Path, run: Run
) -> None:
    family = given(project, "ckptconv_sandwich/hf-sandwich.toml")
    shown = run("ckptconv", "convert", sandwich, tmp_path / "out", *LAYOUT, *family, code=1).stderr
    assert [f"no place for: layers.{i}.attn_out_norm.weight" in shown for i in range(4)] == [True] * 4


def test_family_installed_as_plug_in(
    project: Path, sandwich: Path, install: Callable[..., Path], tmp_path: Path, run: Run
) -> None:
    """Recognised by itself; the dialect is asked for by name; the contract holds; a name that is there twice is an error."""
    site = install(project, tmp_path / "site")
    rows = json.loads(run("ckptconv", "families", "--json", plugins=(site,)).stdout)
    assert [r["origin"] for r in rows if r["name"] == "hf-sandwich"] == ["plug-in ckptconv-sandwich"]
    there, back = tmp_path / "there", tmp_path / "back"
    dialect = ("--mapping", "mcore-sandwich")
    run("ckptconv", "convert", sandwich, there, *LAYOUT, *dialect, plugins=(site,), cwd=tmp_path)
    run("ckptconv", "convert", there, back, "--saver", "hf", *dialect, plugins=(site,), cwd=tmp_path)
    assert (back / WEIGHTS).read_bytes() == (sandwich / WEIGHTS).read_bytes()
    fewer = '    shapes = ("dense", "moe")\n    layouts = ("tp2", "pp2-vpp2")\n'  # built-in mappings are tested on all
    (tmp_path / "test_sandwich.py").write_text((project / "test_sandwich.py").read_text() + fewer)
    contract = ("pytest", "-q", "-p", "no:cacheprovider", "-W", "error", tmp_path / "test_sandwich.py")
    assert " passed" in run(*contract, plugins=(site,), cwd=tmp_path).stdout
    (site / "ckptconv_sandwich" / "hf-llama.toml").write_text("# One that is there already.\n")
    assert "exists twice" in run("ckptconv", "families", plugins=(site,), code=1).stderr


def test_unknown_tensors_fail_with_all_of_them_and_advice(tmp_path: Path, run: Run) -> None:
    shown = run("ckptconv", "convert", with_scales(tmp_path / "hf"), tmp_path / "out", *LAYOUT, code=1).stderr
    for i in range(4):
        assert f"unexpected: model.layers.{i}.self_attn.head_scale.weight" in shown
    assert "--drop GLOB" in shown
    assert "--mapping FILE" in shown
    assert not (tmp_path / "out").exists()


def test_unknown_tensors_are_added_by_mappings_on_both_sides(project: Path, tmp_path: Path, run: Run) -> None:
    hf, there, back = with_scales(tmp_path / "hf"), tmp_path / "there", tmp_path / "back"
    both = given(project, "hf-llama-scaled.toml", "mcore-scaled.toml")
    run("ckptconv", "convert", hf, there, *LAYOUT, *both)
    run("ckptconv", "verify", hf, there, *both)
    run("ckptconv", "convert", there, back, "--saver", "hf", *both)
    assert (back / WEIGHTS).read_bytes() == (hf / WEIGHTS).read_bytes()
    mapping = load_mapping_file(project / "mcore-scaled.toml")
    stored = Mcore().load(there, McoreLoad(), Request(mappings=(mapping,)))
    half = stored.ranks[Rank(pp=1, tp=1, etp=1)][Key("decoder.layers.0.self_attention.head_scale.weight")]
    full = safetensors.read(hf / WEIGHTS).tensors["model.layers.2.self_attn.head_scale.weight"]
    assert half.numpy().tobytes() == full.narrow(0, 24, 48).numpy().tobytes(), "cut with the heads of q"


def test_mapping_on_one_side_alone_is_not_enough(project: Path, tmp_path: Path, run: Run) -> None:
    one = given(project, "hf-llama-scaled.toml")
    shown = run("ckptconv", "convert", with_scales(tmp_path / "hf"), tmp_path / "out", *LAYOUT, *one, code=1).stderr
    assert "no place for: layers.3.attn.head_scale.weight" in shown


def test_unknown_tensors_are_left_out_on_purpose_and_recorded(tmp_path: Path, run: Run) -> None:
    hf, out = with_scales(tmp_path / "hf"), tmp_path / "out"
    run("ckptconv", "convert", hf, out, *LAYOUT, "--drop", "*.head_scale.weight")
    about = json.loads((out / "ckptconv.json").read_text())["about"]
    assert about["dropped"] == [f"model.layers.{i}.self_attn.head_scale.weight" for i in range(4)]
    assert about["options"]["drop"] == ["*.head_scale.weight"]
    plain = write_hf(tmp_path / "plain")
    run("ckptconv", "verify", plain, out)
