"""safetensors: headers read as lazy tensors, and files laid out byte for byte as the library writes them."""

from __future__ import annotations

import json
import random
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


def headed(header: str, folder: Path) -> Path:
    """A file with this header, and the bytes its last entry asks for."""
    text = header.encode()
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return folder / "x.safetensors"


F32 = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
A, B = F32 % (0, 4), F32 % (4, 8)


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{A},"b":{B},"a":{A}}}',
        f'{{"a":{A},"b":{B},"\\u0061":{A}}}',
        f'{{"a" :{A},"b":{B},"a":{A}}}',
        f'{{"a":{A},"b":{B[:-1]},"shape":[1]}}}}',
        f'{{"a":{A},"b":{B[:-1]},"shape" :[1]}}}}',
        f'{{"__metadata__":{{"k":"v","k":"v"}},"a":{A},"b":{B}}}',
        f'{{"__metadata__":{{"k":"v"}},"__metadata__":{{}},"a":{A},"b":{B}}}',
        f'{{"__metadata__":{{"k":"\\":","k":"v"}},"a":{A},"b":{B}}}',
        f'{{"\\":":{A},"b":{B},"b":{B}}}',
    ],
)
def test_no_key_is_read_twice(header: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="twice"):
        st.read(headed(header, tmp_path))


@pytest.mark.parametrize("name", ['\\":', '\\":\\":', "a b", "a\\tb", ":", "\\u003a", ""])
def test_names_and_metadata_may_look_like_keys(name: str, tmp_path: Path) -> None:
    for space in ("", " "):
        header = f'{{"__metadata__":{space}{{"{name}":"{name}"}},{space}"{name}":{A},"b":{B}}}'
        read, text = st.read(headed(header, tmp_path)), json.loads(f'"{name}"')
        assert list(read.tensors) == [text, "b"]
        assert read.metadata == {text: text}


@pytest.mark.parametrize("seed", range(40))
def test_a_header_is_read_quickly_or_slowly_alike(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits of JSON put together at random: whatever is refused, or read, is so without the quick way too."""
    rng = random.Random(seed)
    bits = [
        '"a"',
        '"b"',
        ":",
        ": ",
        ",",
        "{",
        "}",
        A,
        B,
        '"\\":"',
        '"dtype"',
        '"shape":[1]',
        '"__metadata__"',
        '{"k":"v"}',
    ]
    for _ in range(50):
        parts = [
            f'"{rng.choice("abc")}"{rng.choice([":", " :"])}{rng.choice([A, B])}' for _ in range(rng.randint(1, 3))
        ]
        if rng.random() < 0.5:
            parts.insert(rng.randrange(len(parts)), rng.choice(bits))
        path = headed("{" + ",".join(parts) + "}", tmp_path)
        outcomes: list[list[str] | None] = []
        for slowly in (False, True):
            with monkeypatch.context() as patch:
                if slowly:
                    patch.setattr(st, "_quickly", lambda _: None)
                try:
                    outcomes.append(sorted(st.read(path).tensors))
                except FormatError:
                    outcomes.append(None)
        assert outcomes[0] == outcomes[1], path.read_bytes()
