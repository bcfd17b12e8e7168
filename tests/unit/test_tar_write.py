"""Tar archives laid out by us: byte for byte what Python's tarfile writes, and read by it, by GNU tar and by torch."""

from __future__ import annotations

import io
import itertools
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.assemble import Box
from ckptconv.containers import dcp, dcp_write, tar, tar_write, torch_file, torch_write
from ckptconv.dtypes import DTYPES
from ckptconv.errors import PlanError
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.leaves import contiguous, full
from ckptconv.plan import Plan
from ckptconv.source import whole
from ckptconv.tensor import Tensor
from tests.unit.helpers.containers import assert_same, bits, write
from tests.unit.helpers.dcp import load
from tests.unit.helpers.nemo import PLAIN, contents, extracted, nemo

BYTES: dict[str, bytes] = {
    "model_config.yaml": b"a: 1\n",
    "empty": b"",
    "block": bytes(range(256)) * 2,
    "a.b/x": b"before",
    "a/x": b"after the dot",
    "a/.hidden": b"1",
    "a/deep/" + "n" * 150: b"long",
    "a/" + "f" * 110 + "/x": b"long folder",
    "ﬁle ключ": b"not ascii",
}


def as_tarfile_writes(folder: Path, path: Path) -> bytes:
    """What NeMo does with a folder; owner and time set to what ours are."""

    def settle(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = tar_write.TIME
        info.mode = tar_write.FOLDER_MODE if info.isdir() else tar_write.FILE_MODE
        return info

    with tarfile.open(path, "w:") as archive:
        archive.add(folder, arcname=".", filter=settle)
    return path.read_bytes()


def test_bytes_are_those_of_tarfile(tmp_path: Path) -> None:
    for name, content in BYTES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    ours = write(tar_write.layout("x.nemo", list(BYTES.items())), tmp_path)
    assert ours.read_bytes() == as_tarfile_writes(tmp_path / "in", tmp_path / "theirs.tar")


@pytest.mark.parametrize("name", PLAIN)
def test_real_archive_is_laid_out_as_it_was(tmp_path: Path, name: str) -> None:
    """Names, order, kinds and contents; all bytes but for times and owners."""
    path = nemo(name, tmp_path)
    members = [(member, content) for member, content in contents(path).items()]
    ours = write(tar_write.layout("x.nemo", members[::-1]), tmp_path)
    with tarfile.open(path) as real, tarfile.open(ours) as made:
        assert [(m.name, m.type, m.size) for m in made] == [(m.name, m.type, m.size) for m in real]
    assert contents(ours) == contents(path)
    assert ours.read_bytes() == as_tarfile_writes(extracted(path, tmp_path / "x"), tmp_path / "theirs.tar")


def test_order_of_members_does_not_matter(tmp_path: Path) -> None:
    made = {
        write(tar_write.layout("x.nemo", list(order)), tmp_path).read_bytes()
        for order in itertools.islice(itertools.permutations(BYTES.items()), 0, 5000, 500)
    }
    assert len(made) == 1


def test_gnu_tar_reads_it(tmp_path: Path) -> None:
    write(tar_write.layout("x.nemo", list(BYTES.items())), tmp_path)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", "x.nemo", "-C", "out"], cwd=tmp_path, check=True)
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == BYTES


def stored(folder: Path, name: str, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, Tensor]:
    """A tensor of torch's, and ours that reads the same bits from a file."""
    theirs = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    (folder / name).write_bytes(bits(theirs))
    return theirs, contiguous(whole(str(folder / name)), shape, DTYPES["fp32"])


def model(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Tensor]]:
    """One tensor past a piece of the executor, small ones, an empty one."""
    shapes: dict[str, tuple[int, ...]] = {"large": (2300, 2048), "w": (7, 5), "none": (0, 3), "b": (5,)}
    both = {name: stored(folder, f"source {name}", shape, i) for i, (name, shape) in enumerate(shapes.items())}
    return {name: theirs for name, (theirs, _) in both.items()}, {name: ours for name, (_, ours) in both.items()}


def _halves(shape: tuple[int, ...]) -> list[Box]:
    rest = tuple((0, n) for n in shape[1:])
    return [((0, shape[0] // 2), *rest), ((shape[0] // 2, shape[0]), *rest)] if shape[0] else []


def members_of(tensors: dict[str, Tensor]) -> list[tar_write.Member]:
    """Everything at once: torch files, a distributed checkpoint, plain bytes. Both hold tensors of the same names."""
    halves = {name: (tensor, _halves(tensor.shape)) for name, tensor in tensors.items()}
    dist = dcp_write.layout("", halves, {"o/shard_0_1": [None]}, files=2)
    ranks = [f"mp_rank_{i:02d}/model_weights.ckpt" for i in range(2)]
    return [
        ("model_config.yaml", b"a: 1\n"),
        *((rank, torch_write.layout(rank, dict(tensors))) for rank in ranks),
        *((f"model_weights/{file.path}", file) for file in dist),
        ("zeros", b""),
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_executor_writes_members_that_torch_reads(tmp_path: Path, workers: int) -> None:
    theirs, ours = model(tmp_path)
    file = tar_write.layout("x.nemo", members_of(ours))
    execute(Plan((file,)), tmp_path / "out", ExecuteOptions(durable=False, workers=workers))
    path = tmp_path / "out" / "x.nemo"
    assert path.stat().st_size == file.size
    folder = extracted(path, tmp_path / "x")
    for rank in range(2):
        member = folder / f"mp_rank_{rank:02d}" / "model_weights.ckpt"
        with zipfile.ZipFile(member) as archive:
            assert archive.testzip() is None
        loaded: Any = torch.load(member)
        assert {name: bits(t) for name, t in loaded.items()} == {name: bits(t) for name, t in theirs.items()}
    distributed = load(folder / "model_weights")
    assert {name: bits(t) for name, t in distributed.items()} == {name: bits(t) for name, t in theirs.items()}
    found = tar.open_tar(path)
    again = torch_file.read(found.members["mp_rank_01/model_weights.ckpt"], check=True)
    assert_same(again, theirs)
    inside = dcp.tensors(dcp.interpret(found.title("model_weights"), found.below("model_weights")))
    for name, tensor in theirs.items():
        assert_same(inside[name], tensor, name)


def test_executor_and_plain_writer_agree(tmp_path: Path) -> None:
    _, ours = model(tmp_path)
    file = tar_write.layout("x.nemo", members_of(ours))
    execute(Plan((file,)), tmp_path / "out", ExecuteOptions(durable=False))
    assert (tmp_path / "out" / "x.nemo").read_bytes() == write(file, tmp_path).read_bytes()


def test_segments_are_called_by_member_and_name(tmp_path: Path) -> None:
    _, ours = model(tmp_path)
    file = tar_write.layout("x.nemo", members_of(ours))
    names = [segment.name for segment in file.segments if isinstance(segment.body, Tensor)]
    assert len(names) == len(set(names))
    assert {"mp_rank_00/model_weights.ckpt!w", "mp_rank_01/model_weights.ckpt!w"} <= set(names)


@pytest.mark.parametrize("size", [(8 << 30) - 1, 8 << 30, (9 << 30) + 5])
def test_member_of_eight_gigabytes(tmp_path: Path, size: int) -> None:
    """Only headers are written, the data is a hole; both tarfile and GNU tar find what comes after it."""
    large = torch_write.layout("w", {"w": full((size,), DTYPES["uint8"], 0)})
    file = tar_write.layout("x.nemo", [("a", large), ("b", b"after")])
    with (tmp_path / "x.nemo").open("wb") as out:
        out.truncate(file.size)
        for segment in file.segments:
            if isinstance(segment.body, bytes):
                out.seek(segment.offset)
                out.write(segment.body)
    with tarfile.open(tmp_path / "x.nemo") as archive:
        assert [(m.name, m.size) for m in archive] == [(".", 0), ("./a", large.size), ("./b", 5)]
        after = archive.extractfile("./b")
        assert after is not None
        assert after.read() == b"after"
    listed = subprocess.run(["tar", "-tf", "x.nemo"], cwd=tmp_path, check=True, capture_output=True).stdout
    assert listed == b"./\n./a\n./b\n"
    assert tar.open_tar(tmp_path / "x.nemo").members["a"].nbytes == large.size


@pytest.mark.parametrize("count", [0, 15, 16, 17, 18, 19, 20, 40])
def test_size_is_a_multiple_of_a_record(tmp_path: Path, count: int) -> None:
    members = [(f"{i:02d}", b"") for i in range(count)]
    file = tar_write.layout("x.nemo", members)
    assert file.size % 10240 == 0
    with tarfile.open(fileobj=io.BytesIO(write(file, tmp_path).read_bytes())) as archive:
        assert archive.getnames() == [".", *(f"./{name}" for name, _ in members)]


BAD = ["/etc/passwd", "../x", "a/../x", "./x", "a//b", "a/", "", ".", "a\\b", "a\nb", "a\0b", "a/./b", "x" * 5000]


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name[:20]))
def test_name_that_reading_would_refuse_is_not_written(name: str) -> None:
    with pytest.raises(PlanError, match="not a plain relative path"):
        tar_write.layout("x.nemo", [(name, b"")])


def test_all_that_is_wrong_with_names_is_listed() -> None:
    with pytest.raises(PlanError) as caught:
        tar_write.layout("x.nemo", [("a", b""), ("a/b", b""), ("c", b""), ("c", b"1"), ("../d", b"")])
    for part in ("a is a file and a folder too", "c is there 2 times", "'../d' is not a plain"):
        assert part in str(caught.value)
