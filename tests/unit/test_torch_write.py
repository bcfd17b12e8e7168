"""Torch files laid out by us: torch, zipfile and our own reader find in them what was put in."""

from __future__ import annotations

import argparse
import os
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.collecting import no_collecting
from ckptconv.containers import torch_file, torch_write
from ckptconv.containers.pickled import Global, Namespace, Opaque, Ordered, TorchDType, bytes_io
from ckptconv.dtypes import DTYPES
from ckptconv.errors import FormatError
from ckptconv.leaves import full
from ckptconv.nodes import concat
from ckptconv.plan import Late
from ckptconv.tensor import Tensor
from tests.unit.helpers.containers import assert_same, torch_load, write
from tests.unit.test_torch_file import GOLDENS, OBJECTS

FP32 = DTYPES["fp32"]


def example() -> dict[str, object]:
    weights = {f"w.{name}": full((2, 3), d, 1) for name, d in DTYPES.items()}
    return {
        "args": Namespace(tp=2, dtype=TorchDType("bfloat16"), lr=0.5, nothing=None, names=["a", "b"], pair=(1, -2)),
        "model": Ordered({**weights, "scalar": full((), FP32, 2), "empty": full((0, 4), FP32, 0)}),
        "iteration": 1 << 40,
        "_extra_state": bytes_io(b"\x00\xff"),
    }


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_torch_loads_it(tmp_path: Path, weights_only: bool, mmap: bool) -> None:
    value = example()
    if weights_only:
        del value["_extra_state"]
    path = write(torch_write.layout("m.pt", value), tmp_path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert_same(value, torch.load(path, weights_only=weights_only, mmap=mmap))


def test_every_record_is_aligned_and_has_its_checksum(tmp_path: Path) -> None:
    path = write(torch_write.layout("m.pt", example()), tmp_path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[:4] == [
            f"m/{n}" for n in ("data.pkl", ".format_version", ".storage_alignment", "byteorder")
        ]
        for info in archive.infolist():
            name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename


@pytest.mark.parametrize("name", OBJECTS)
def test_what_torch_saved_is_written_back_the_same(tmp_path: Path, name: str) -> None:
    torch.save(OBJECTS[name], tmp_path / "x.pt")
    path = write(torch_write.layout("y.pt", torch_file.read(tmp_path / "x.pt")), tmp_path)
    assert_same(torch_file.read(path, check=True), torch_load(tmp_path / "x.pt"))
    assert_same(torch_file.read(path), torch_load(path))


@pytest.mark.parametrize("golden", GOLDENS[::3], ids=lambda p: "/".join(p.parts[-4:-1]))
def test_megatron_file_is_written_back_the_same(tmp_path: Path, golden: Path) -> None:
    path = write(torch_write.layout("model_optim_rng.pt", torch_file.read(golden)), tmp_path)
    assert_same(torch_file.read(golden), torch_load(path, mmap=True))


def test_same_object_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (torch_write.layout("m.pt", example() | {"set": {"b", "a", "c"}}) for _ in range(2))
    assert first == second


def test_one_tensor_met_twice_is_stored_once(tmp_path: Path) -> None:
    tied = full((4,), FP32, 1)
    path = write(torch_write.layout("m.pt", {"embed": tied, "head": tied, "other": full((4,), FP32, 1)}), tmp_path)
    loaded = torch.load(path)
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr() != loaded["other"].data_ptr()


def test_shared_containers_stay_one_object(tmp_path: Path) -> None:
    shared: list[object] = [1]
    loaded = torch.load(write(torch_write.layout("m.pt", {"a": shared, "b": shared}), tmp_path))
    assert loaded["a"] is loaded["b"]


def test_segments_are_named_by_path_or_as_told() -> None:
    state = {"model": {"a.w": full((2,), FP32, 0), "b.w": full((2,), FP32, 0)}, "list": [full((1,), FP32, 0)]}
    file = torch_write.layout("m.pt", state, names={"model/b.w": "called"})
    assert [s.name for s in file.segments if isinstance(s.body, Tensor)] == ["model/a.w", "called", "list/0"]


def test_cut_and_joined_tensors_are_written(tmp_path: Path) -> None:
    tensor = concat([full((1, 4), FP32, 1), full((2, 4), FP32, 2)], 0).permute((1, 0))
    loaded = torch.load(write(torch_write.layout("m.pt", {"t": tensor}), tmp_path))
    assert loaded["t"].tolist() == [[1, 2, 2]] * 4


def test_file_without_tensors(tmp_path: Path) -> None:
    file = torch_write.layout("m.pt", {"only": "text"})
    assert not any(isinstance(s.body, Late) for s in file.segments)
    assert torch.load(write(file, tmp_path)) == {"only": "text"}


def test_unknown_objects_are_not_written_unless_allowed(tmp_path: Path) -> None:
    value = {"hook": Opaque("somewhere", "run", ("x",))}
    with pytest.raises(FormatError, match=r"hook names somewhere.run"):
        torch_write.layout("m.pt", value)
    file = torch_write.layout("m.pt", value, allowed=["somewhere.run"])
    assert torch_file.read(write(file, tmp_path)) == value


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.hub.load", "builtins.getattr"])
def test_code_is_never_written(name: str) -> None:
    module, _, function = name.rpartition(".")
    with pytest.raises(FormatError, match="not known to be harmless"):
        torch_write.layout("m.pt", [Global(module, function)], allowed=[name])


@pytest.mark.parametrize(
    "value", [object(), torch.ones(1), 1j, "\ud800"], ids=["object", "torch", "complex", "surrogate"]
)
def test_what_is_not_plain_data_is_refused(value: object) -> None:
    with pytest.raises(FormatError, match=r"m\.pt: a/b"):
        torch_write.layout("m.pt", {"a": {"b": value}})


def test_object_that_contains_itself_has_a_bound() -> None:
    loop: tuple[Any, ...] = ([],)
    for _ in range(200):
        loop = (loop,)
    with pytest.raises(FormatError, match="nested deeper"):
        torch_write.layout("m.pt", loop)


def test_file_beyond_four_gigabytes_is_loaded(tmp_path: Path) -> None:
    """Sparse: the headers are written where they belong, of the tensors only the ends."""
    big = (1 << 32) + 4096
    state = {"big": full((big,), DTYPES["uint8"], 0), "after": full((3,), FP32, 7), "more": full((1,), FP32, 8)}
    file = torch_write.layout("big.pt", state)
    path = tmp_path / "big.pt"
    with path.open("wb") as out:
        out.truncate(file.size)
        for segment in file.segments:
            out.seek(segment.offset)
            if isinstance(segment.body, Tensor):
                out.write(segment.body.numpy().tobytes() if segment.nbytes < 100 else b"")
            else:
                out.write(segment.body if isinstance(segment.body, bytes) else segment.body.template)
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["big"].shape == (big,)
    assert (loaded["after"].tolist(), loaded["more"].tolist()) == ([7, 7, 7], [8])
    assert file.size > 1 << 32
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("big/data/0").file_size == big
    ours = torch_file.read(path)
    assert isinstance(ours, dict)
    assert ours["after"].numpy().tolist() == [7, 7, 7]
    os.truncate(path, file.size - 1)
    with pytest.raises(FormatError, match="truncated"):
        torch_file.read(path)


def test_layout_of_twenty_thousand_tensors_is_quick() -> None:
    state = {f"layers.{i}.weight": full((8, 8), FP32, i) for i in range(20_000)}
    start = time.process_time()
    with no_collecting():  # as all planning is
        torch_write.layout("m.pt", {"model": state})
    assert time.process_time() - start < 2  # about 0.5 s; the bound allows for a busy machine
