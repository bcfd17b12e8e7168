"""The Python API: lazy tensors that give numpy arrays, what the package exports, and that it is typed."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import pytest
import torch
from safetensors import safe_open

import ckptconv
from ckptconv.bind import bind
from ckptconv.pipeline import VERSION
from ckptconv.testing.checkpoints import write_hf
from ckptconv.topology import Rank, even
from tests.cli.helpers.console import bits


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("source", ["llama", "mixtral"])
def test_load_equals_what_safetensors_reads(source: str, dtype: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / source, source, dtype=dtype)
    checkpoint = ckptconv.load(folder)
    names = {}
    mapping, config = ckptconv.prepare(ckptconv.Job(folder, saver="hf")).stored.mapping, checkpoint.config
    for row in bind(mapping, checkpoint.origin.variant, config, even(config.layers), Rank()):
        (names[row.stored],) = row.atoms
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(names)
        for stored, atom in names.items():
            expected = file.get_tensor(stored)
            lazy = checkpoint.tensors[ckptconv.Key(atom)]
            assert lazy.shape == tuple(expected.shape)
            values = lazy.numpy()
            assert values.dtype == lazy.dtype.numpy
            assert bits(values) == bits(expected.contiguous().view(torch.uint8).numpy())


def test_load_from_ranks_equals_load_from_the_original(models: Path) -> None:
    one, two = ckptconv.load(models / "llama"), ckptconv.load(models / "m22")
    assert (one.tensors.keys(), one.config.vocab) == (two.tensors.keys(), two.config.vocab)
    key = ckptconv.Key("layers.3.attn.q.weight")
    assert bits(one.tensors[key].numpy()) == bits(two.tensors[key].numpy())
    rows = one.tensors[key].narrow(0, 6, 12)
    assert bits(rows.numpy()) == bits(one.tensors[key].numpy()[6:12])


def test_load_takes_the_options_of_the_command_line(models: Path) -> None:
    config = models / "llama" / "config.json"
    checkpoint = ckptconv.load(models / "m22", loader="core", loader_options={"config": config}, vocab_size=61)
    assert checkpoint.config.vocab == 61
    with pytest.raises(ckptconv.CkptconvError, match=r"--loader\.config"):
        ckptconv.load(models / "m22", loader_options={"colour": "red"})


def test_convert_and_verify(models: Path, tmp_path: Path) -> None:
    report = ckptconv.convert(models / "llama", tmp_path / "out", saver="mcore", pp=2, pp_layers=[1, 3], tp="1:4")
    assert_type(report, ckptconv.Report)
    assert report.bytes_resumed == 0
    verdict = ckptconv.verify(models / "llama", tmp_path / "out")
    assert verdict.same
    assert verdict.tensors == 39


def test_types_are_known(models: Path) -> None:
    checkpoint = ckptconv.load(models / "llama")
    assert_type(checkpoint, ckptconv.Checkpoint)
    assert_type(checkpoint.tensors[ckptconv.Key("norm.weight")], ckptconv.Tensor)
    assert (Path(ckptconv.__file__).parent / "py.typed").exists()


def test_all_is_what_is_exported() -> None:
    assert ckptconv.__all__ == sorted(ckptconv.__all__)
    for name in ckptconv.__all__:
        assert getattr(ckptconv, name).__module__.startswith("ckptconv.")
    assert set(ckptconv._HOMES) == set(ckptconv.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = ckptconv.nothing  # type: ignore[attr-defined]


def test_one_version() -> None:
    assert ckptconv.__version__ == VERSION
