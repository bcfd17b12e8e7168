"""Torch distributed checkpoints laid out by us: torch's reader and torch.load find in them what was put in."""

from __future__ import annotations

import io
import random
import struct
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.assemble import Box
from ckptconv.containers import dcp, dcp_write
from ckptconv.containers.pickled import Opaque, bytes_io, bytes_of
from ckptconv.dtypes import DTYPES
from ckptconv.errors import FormatError, PlanError
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.leaves import contiguous, full
from ckptconv.plan import File, Late, Plan
from ckptconv.source import whole
from ckptconv.tensor import Tensor
from tests.unit.helpers.containers import assert_same, bits, write
from tests.unit.helpers.dcp import grid, load, load_objects
from tests.unit.test_dcp import LLAMA

FP32, UINT8 = DTYPES["fp32"], DTYPES["uint8"]


def whole_box(tensor: Tensor) -> list[Box]:
    return [tuple((0, n) for n in tensor.shape)]


def written(folder: Path, files: Sequence[File]) -> Path:
    """The files, by a writer that is not the executor."""
    for file in files:
        write(file, folder)
    return folder


def stored(folder: Path, tensor: torch.Tensor, name: str = "source") -> Tensor:
    """A lazy tensor of the same bits, read from a file."""
    path = folder / name
    path.write_bytes(bits(tensor))
    dtype = next(d for d in DTYPES.values() if d.torch == str(tensor.dtype).removeprefix("torch."))
    return contiguous(whole(str(path)), tuple(tensor.shape), dtype)


def every_type(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, tuple[Tensor, list[Box]]]]:
    base = torch.arange(24).reshape(4, 6)
    theirs = {name: base.to(getattr(torch, d.torch)) for name, d in DTYPES.items()}
    theirs |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "also empty": torch.zeros(3, 0)}
    ours = {key: stored(folder, t, f"source {key}") for key, t in theirs.items()}
    return theirs, {key: (t, grid(random.Random(key), t.shape, 5)) for key, t in ours.items()}


@pytest.mark.parametrize("files", [1, 3, 1000])
def test_torch_reads_every_type(tmp_path: Path, files: int) -> None:
    theirs, ours = every_type(tmp_path)
    folder = written(tmp_path / "x", dcp_write.layout("", ours, files=files))
    loaded = load(folder)
    assert loaded.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert loaded[key].dtype == tensor.dtype, key
        assert bits(loaded[key]) == bits(tensor), key
    again = dcp.tensors(dcp.read(folder))
    for key, tensor in theirs.items():
        assert_same(again[key], tensor, key)
    count = sum(len(boxes) for _, boxes in ours.values())
    assert len(list(folder.glob("*.distcp"))) == min(files, count)


OBJECTS: dict[str, Any] = {
    "a._extra_state/shard_0_2": [None],
    "b._extra_state/shard_0_1": [bytes_io(b"\x00state")],
    "lr": {"max_lr": 0.5, "steps": (1, 2), "names": ["x", "ü"]},
    "tensors": [full((2, 3), FP32, 1.5), full((4,), UINT8, 7)],
}


def test_torch_reads_the_objects(tmp_path: Path) -> None:
    weights = {"w": (full((3, 2), FP32, 1), whole_box(full((3, 2), FP32, 1)))}
    folder = written(tmp_path, dcp_write.layout("", weights, OBJECTS, files=2))
    loaded = load_objects(folder)
    assert loaded["a._extra_state/shard_0_2"] == [None]
    assert loaded["b._extra_state/shard_0_1"][0].getvalue() == b"\x00state"
    assert loaded["lr"] == OBJECTS["lr"]
    assert [t.tolist() for t in loaded["tensors"]] == [[[1.5] * 3] * 2, [7] * 4]
    found = dcp.read(folder)
    extra = dcp.value(found.objects["b._extra_state/shard_0_1"])
    assert isinstance(extra, list)
    assert bytes_of(extra[0]) == b"\x00state"
    for key, item in found.objects.items():
        assert_same(dcp.value(item), loaded[key], key)


def test_every_blob_is_a_torch_file_of_its_own(tmp_path: Path) -> None:
    _, ours = every_type(tmp_path)
    folder = written(tmp_path / "x", dcp_write.layout("", ours, OBJECTS, files=2))
    found = dcp.read(folder)
    items = [*found.objects.values(), *(c.item for e in found.tensors.values() for c in e.chunks)]
    assert found.unused == ()
    for item in items:
        data = Path(item.path).read_bytes()[item.offset : item.offset + item.nbytes]
        torch.load(io.BytesIO(data), weights_only=False)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.testzip() is None
            for info in archive.infolist():
                name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
                assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename


def test_real_checkpoint_is_written_back_the_same(tmp_path: Path) -> None:
    """Tensors, chunks and what the objects say; then both are read by torch."""
    found = dcp.read(LLAMA)
    tensors = {
        key: (tensor, [tuple((o, o + n) for o, n in zip(c.offset, c.shape, strict=True)) for c in entry.chunks])
        for (key, tensor), entry in zip(dcp.tensors(found).items(), found.tensors.values(), strict=True)
    }
    objects = {key: dcp.value(item) for key, item in found.objects.items() if "_extra_state" in key}
    folder = written(tmp_path, dcp_write.layout("iter_0000007", tensors, objects, files=3)) / "iter_0000007"
    theirs, again = load(LLAMA), dcp.read(folder)
    for key, tensor in load(folder).items():
        assert torch.equal(tensor, theirs[key]), key
    for key, entry in found.tensors.items():
        assert [c[:2] for c in again.tensors[key].chunks] == [c[:2] for c in entry.chunks]
    assert again.objects.keys() == objects.keys()


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 6), max_size=4), st.integers(0, 12))
def test_any_grid_is_read_by_torch(
    tmp_path_factory: pytest.TempPathFactory, rng: Any, shape: list[int], cuts: int
) -> None:
    folder = tmp_path_factory.mktemp("grid")
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(rng.choice([torch.bfloat16, torch.int64]))
    ours = {"w": (stored(folder, tensor), grid(rng, shape, cuts))}
    files = dcp_write.layout("x", ours, files=rng.randint(1, 4))
    assert bits(load(written(folder, files) / "x")["w"]) == bits(tensor)


def test_executor_writes_it(tmp_path: Path) -> None:
    theirs, ours = every_type(tmp_path)
    files = dcp_write.layout("iter_0000001", ours, {"o": [None]}, files=2)
    execute(Plan(tuple(files)), tmp_path / "out", ExecuteOptions(durable=False))
    loaded = load(tmp_path / "out" / "iter_0000001")
    assert {k: bits(t) for k, t in loaded.items()} == {k: bits(t) for k, t in theirs.items()}


def test_same_input_gives_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    _, ours = every_type(tmp_path)
    first, second = (dcp_write.layout("x", ours, {"o": [None]}, files=3) for _ in range(2))
    assert first == second
    assert first[-1].path == "x/.metadata"
    assert [file.final for file in first] == [False] * 3 + [True]
    body = first[-1].segments[0].body
    assert isinstance(body, bytes)
    assert str(tmp_path).encode() not in body


def test_files_are_of_about_the_same_size() -> None:
    tensor = full((64, 1000), FP32, 0)
    big = full((600, 100), FP32, 0)
    ours: dict[str, tuple[Tensor, list[Box]]] = {
        "w": (tensor, [((i, i + 1), (0, 1000)) for i in range(64)]),
        "big": (big, whole_box(big)),
    }
    sizes = [file.size for file in dcp_write.layout("", ours, files=2)[:-1]]
    assert max(sizes) - min(sizes) < 8000  # two chunks


def test_segments_are_named_by_key_and_box() -> None:
    tensor = full((4, 3), FP32, 0)
    ours: dict[str, tuple[Tensor, list[Box]]] = {
        "one": (tensor, whole_box(tensor)),
        "two": (tensor, [((0, 2), (0, 3)), ((2, 4), (0, 3))]),
    }
    file = dcp_write.layout("", ours, {"o": [tensor]})[0]
    names = [s.name for s in file.segments if isinstance(s.body, Tensor)]
    assert names == ["o/0", "one", "two[0:2, 0:3]", "two[2:4, 0:3]"]


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([((0, 2), (0, 3))], "only"),
        ([((0, 4), (0, 3)), ((3, 4), (0, 3))], "overlap"),
        ([((0, 4), (0, 4))], "outside"),
        ([], "nothing covers"),
    ],
)
def test_boxes_that_do_not_tile_are_refused(boxes: list[Box], problem: str) -> None:
    with pytest.raises(PlanError, match=f"w: .*{problem}"):
        dcp_write.layout("", {"w": (full((4, 3), FP32, 0), boxes)})


def test_key_of_a_tensor_and_an_object_is_refused() -> None:
    tensor = full((2,), FP32, 0)
    with pytest.raises(PlanError, match="w is both a tensor and an object"):
        dcp_write.layout("", {"w": (tensor, whole_box(tensor))}, {"w": [None]})


def test_unknown_objects_are_not_written_unless_allowed() -> None:
    value = [Opaque("somewhere", "run", ("x",))]
    with pytest.raises(FormatError, match=r"names somewhere.run"):
        dcp_write.layout("", {}, {"o": value})
    assert len(dcp_write.layout("", {}, {"o": value}, allowed=["somewhere.run"])) == 2


def test_blob_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Sparse: only what is not a large tensor is written. The blob after it begins beyond 4 GB."""
    big, after = full(((1 << 32) + 4096,), UINT8, 0), full((3,), FP32, 7)
    files = dcp_write.layout("", {"big": (big, whole_box(big)), "after": (after, whole_box(after))})
    for file in files:
        with (tmp_path / file.path).open("wb") as out:
            out.truncate(file.size)
            for segment in file.segments:
                if isinstance(segment.body, Tensor) and segment.nbytes > 100:
                    continue
                out.seek(segment.offset)
                body = segment.body.numpy().tobytes() if isinstance(segment.body, Tensor) else segment.body
                out.write(body.template if isinstance(body, Late) else body)
    found = dcp.read(tmp_path)
    ours = dcp.tensors(found)
    assert ours["after"].numpy().tolist() == [7, 7, 7]
    assert ours["big"].narrow(0, 1 << 32, (1 << 32) + 2).numpy().tolist() == [0, 0]
    (chunk,) = found.tensors["after"].chunks
    assert chunk.item.offset > 1 << 32
    view = np.memmap(chunk.item.path, np.uint8, "r", chunk.item.offset, (chunk.item.nbytes,))
    assert torch.load(io.BytesIO(view.tobytes())).tolist() == [7, 7, 7]


def test_hundred_thousand_chunks_are_laid_out_in_seconds() -> None:
    tensor = full((60, 1700, 4), FP32, 0)
    boxes: list[Box] = [((i, i + 1), (j, j + 1), (0, 4)) for i in range(60) for j in range(1700)]
    start = time.process_time()
    dcp_write.layout("", {"w": (tensor, boxes)}, files=4)
    assert time.process_time() - start < 20  # about 5 s
