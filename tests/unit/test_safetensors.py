"""safetensors: headers read as lazy tensors, and files laid out byte for byte as the library writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from ckptconv.containers import safetensors as st
from ckptconv.dtypes import BY_TORCH, DTYPES
from ckptconv.errors import FormatError
from ckptconv.leaves import full
from ckptconv.nodes import View
from ckptconv.plan import File
from ckptconv.source import Source
from tests.unit.helpers.containers import bits, write


def example() -> dict[str, torch.Tensor]:
    tensors = {f"{name}.w": torch.arange(6).reshape(2, 3).to(getattr(torch, d.torch)) for name, d in DTYPES.items()}
    return tensors | {
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
        "b.10": torch.ones(3),
        "b.9": torch.ones(1),
    }


def saved(tmp_path: Path, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(example(), tmp_path / "a.safetensors", metadata)
    return tmp_path / "a.safetensors"


def test_read_every_dtype_equals_the_library(tmp_path: Path) -> None:
    path = saved(tmp_path, {"format": "pt"})
    ours, theirs = st.read(path), example()
    assert ours.metadata == {"format": "pt"}
    assert set(ours.tensors) == set(theirs)
    for name, tensor in ours.tensors.items():
        assert tensor.shape == tuple(theirs[name].shape)
        assert tensor.dtype is BY_TORCH[str(theirs[name].dtype).removeprefix("torch.")]
        assert tensor.numpy().tobytes() == bits(theirs[name])


def test_read_gives_windows_in_file_order(tmp_path: Path) -> None:
    tensors = st.read(saved(tmp_path)).tensors.values()
    offsets = [t.source.offset for t in tensors if isinstance(t, View)]
    assert offsets == sorted(offsets)
    assert len(offsets) == len(example()) - 1


def test_read_inside_another_file(tmp_path: Path) -> None:
    data = saved(tmp_path).read_bytes()
    (tmp_path / "outer").write_bytes(b"x" * 100 + data + b"y" * 50)
    place = Source(str(tmp_path / "outer"), 100, len(data))
    assert st.read(place).tensors["scalar"].numpy() == np.float32(1.5)
    with pytest.raises(FormatError, match=r"outer!member"):
        st.read(place._replace(nbytes=len(data) - 1), where="outer!member")


def test_layout_bytes_equal_the_library(tmp_path: Path) -> None:
    path = saved(tmp_path, {"format": "pt"})
    again = st.layout("b.safetensors", dict(reversed(st.read(path).tensors.items())), {"format": "pt"})
    assert write(again, tmp_path).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["ü.w", "emoji-😀", 'a"b\\c', "tab\tand\x01", "x" * 1000])
def test_layout_spells_names_as_the_library_does(tmp_path: Path, name: str) -> None:
    safetensors.numpy.save_file({name: np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    again = st.layout("b.safetensors", {name: full((1,), DTYPES["fp32"], 0)}, {})
    assert write(again, tmp_path).read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_layout_of_nothing_is_readable(tmp_path: Path) -> None:
    path = write(st.layout("e.safetensors", {}, {}), tmp_path)
    assert safetensors.numpy.load_file(path) == {}
    assert st.read(path).tensors == {}


def test_layout_is_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": full((3, 2), DTYPES["bf16"], 2.5),
        "b": full((), DTYPES["int64"], 7),
        "c": full((0,), DTYPES["fp32"], 0),
    }
    loaded = safetensors.torch.load_file(write(st.layout("x.safetensors", tensors, {}), tmp_path))
    assert torch.equal(loaded["a"], torch.full((3, 2), 2.5, dtype=torch.bfloat16))
    assert loaded["b"].item() == 7
    assert loaded["c"].shape == (0,)


def test_layout_names_segments_after_tensors() -> None:
    file = st.layout("x.safetensors", {"a": full((3,), DTYPES["fp32"], 0)}, {})
    assert isinstance(file, File)
    assert [s.name for s in file.segments] == ["", "a"]


def test_layout_refuses_the_reserved_name() -> None:
    with pytest.raises(FormatError, match="__metadata__"):
        st.layout("x.safetensors", {"__metadata__": full((1,), DTYPES["fp32"], 0)}, {})
