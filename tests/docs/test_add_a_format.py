"""docs/add-a-format.md, done as it says: the format it builds is installed as a plug-in and used from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptconv.testing.checkpoints import WEIGHTS, write_hf


@pytest.fixture(scope="module")
def project(doc_files: Callable[[str, Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return doc_files("add-a-format.md", tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def plugin(project: Path, install: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(shutil.copytree(project, project.parent / "copy"), tmp_path_factory.mktemp("site") / "npy")


def test_plugin_is_listed_with_its_options(plugin: Path, run: Callable[..., Any]) -> None:
    listed = json.loads(run("ckptconv", "formats", "--json", plugins=(plugin,)).stdout)
    (row,) = [r for r in listed if r["name"] == "npy"]
    assert row["origin"] == "plug-in ckptconv-npy 0.1.0"
    built_in = [r["name"] for r in listed if r["origin"] == "built-in"]
    megatron, nemo = ["mcore", "mcore-dist", "legacy"], ["nemo", "nemo2", "lightning"]
    assert built_in == ["hf", *megatron, *nemo, "openai-clip", "mm-projector", "dcp"]
    shown = run("ckptconv", "formats", "npy", plugins=(plugin,)).stdout
    assert "--saver.indent" in shown
    assert "spaces of indentation" in shown


def test_plugin_is_not_there_without_being_installed(run: Callable[..., Any]) -> None:
    assert "npy" in run("ckptconv", "formats", "npy", code=2).stderr


def test_hf_to_plugin_and_back_is_byte_for_byte(plugin: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    write_hf(tmp_path / "hf", "qwen2")
    there, back = tmp_path / "there", tmp_path / "back"
    run("ckptconv", "convert", tmp_path / "hf", there, "--saver", "npy", "--saver.indent", "2", plugins=(plugin,))
    run("ckptconv", "verify", tmp_path / "hf", there, plugins=(plugin,))
    run("ckptconv", "convert", there, back, "--saver", "hf", plugins=(plugin,))
    assert (back / WEIGHTS).read_bytes() == (tmp_path / "hf" / WEIGHTS).read_bytes()
    rows = json.loads((there / "index.json").read_text())["tensors"]
    assert np.load(there / "00000.npy").shape == tuple(rows[0][2])


def test_plugin_and_megatron_know_nothing_of_each_other(plugin: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    write_hf(tmp_path / "hf", "mixtral")
    megatron, there = tmp_path / "megatron", tmp_path / "there"
    run("ckptconv", "convert", tmp_path / "hf", megatron, "--saver", "mcore", "--tp", "2", "--ep", "2")
    run("ckptconv", "convert", megatron, there, "--saver", "npy", plugins=(plugin,))
    run("ckptconv", "verify", tmp_path / "hf", there, plugins=(plugin,))


def test_damage_is_told_by_file(plugin: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    write_hf(tmp_path / "hf")
    run("ckptconv", "convert", tmp_path / "hf", tmp_path / "npy", "--saver", "npy", plugins=(plugin,))
    file = tmp_path / "npy" / "00007.npy"
    file.write_bytes(file.read_bytes()[:-2])
    shown = run("ckptconv", "inspect", tmp_path / "npy", plugins=(plugin,), code=1)
    assert "00007.npy" in shown.stderr


def test_plugin_keeps_the_contract(project: Path, plugin: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """Run as its author would run it; on the fewest models, as the built-in formats are tested on all."""
    text = (project / "test_npy.py").read_text() + '    models = ("llama-tied",)\n'
    (tmp_path / "test_npy.py").write_text(text)
    done = run("pytest", "-q", "-p", "no:cacheprovider", "-W", "error", tmp_path, plugins=(plugin,), cwd=tmp_path)
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed > 50
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("taken", ["npy", "hf"])
def test_name_that_is_taken_is_an_error(taken: str, plugin: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """Two plug-ins of one name, or one with the name of a built-in format: nothing is chosen silently."""
    other = tmp_path / "site"
    info = other / "other_format-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-format\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[ckptconv.formats]\n{taken} = ckptconv_npy:Npy\n")
    shown = run("ckptconv", "formats", plugins=(plugin, other), code=2).stderr
    assert repr(taken) in shown
    assert "already taken" in shown
    write_hf(tmp_path / "hf")
    asked = ("convert", tmp_path / "hf", tmp_path / "out", "--loader", "hf", "--saver", "mcore")
    assert run("ckptconv", *asked, plugins=(plugin, other), code=2).stderr == shown
