"""Tar archives read in place: real ones of NeMo, and what Python's tarfile and GNU tar write, in all their dialects."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from ckptconv.containers import dcp, gzipped, tar, torch_file, zarr2
from ckptconv.errors import FormatError, PlanError
from ckptconv.source import Source, identity
from tests.unit.helpers.containers import assert_same
from tests.unit.helpers.dcp import load, load_objects
from tests.unit.helpers.nemo import (
    GZIPPED,
    PER_RANK,
    PLAIN,
    TORCH_DIST,
    ZARR,
    contents,
    extracted,
    gunzipped,
    nemo,
    nemo_gz,
)  # fmt: skip


def bytes_of(source: Source) -> bytes:
    with open(source.path, "rb") as file:
        file.seek(source.offset)
        return file.read(source.nbytes)


def same_members(found: tar.Tar, expected: dict[str, bytes]) -> None:
    assert {name: bytes_of(source) for name, source in found.members.items()} == expected


@pytest.mark.parametrize("name", PLAIN)
def test_members_of_real_archive_are_those_tarfile_finds(tmp_path: Path, name: str) -> None:
    path = nemo(name, tmp_path)
    found = tar.open_tar(path)
    same_members(found, contents(path))
    with tarfile.open(path) as archive:
        folders = {m.name.removeprefix("./") for m in archive if m.isdir()} - {"."}
    assert found.folders == folders
    assert (found.where, tar.is_tar(path)) == (str(path), True)
    assert {source.path for source in found.members.values()} == {str(path)}


def test_torch_dist_is_read_inside_the_archive(tmp_path: Path) -> None:
    found = tar.open_tar(nemo(TORCH_DIST, tmp_path))
    ours = dcp.interpret(found.title("model_weights"), found.below("model_weights"))
    folder = extracted(tmp_path / f"{TORCH_DIST}.nemo", tmp_path / "x") / "model_weights"
    theirs, objects = load(folder), load_objects(folder)
    tensors = dcp.tensors(ours)
    assert tensors.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert_same(tensors[key], tensor, key)
    assert ours.objects.keys() == objects.keys()
    assert all(isinstance(dcp.value(item), list) for item in ours.objects.values())
    assert ours.unused == ()
    assert {chunk.item.path for entry in ours.tensors.values() for chunk in entry.chunks} == {found.where}


def test_zarr_is_read_inside_the_archive(tmp_path: Path) -> None:
    found = tar.open_tar(nemo(ZARR, tmp_path))
    ours = zarr2.interpret(found.title("model_weights"), found.below("model_weights"))
    folder = extracted(tmp_path / f"{ZARR}.nemo", tmp_path / "x") / "model_weights"
    tensors = zarr2.tensors(ours)
    assert tensors.keys() == {path.parent.name for path in folder.glob("*/.zarray")}
    for key, tensor in tensors.items():
        array = zarr.open_array(folder / key, mode="r", zarr_format=2)[...]
        assert isinstance(array, np.ndarray)
        assert (array.dtype, array.shape) == (tensor.dtype.numpy, tensor.shape)
        assert array.tobytes() == tensor.numpy().tobytes(), key
    assert {f"{key}.pt" for key in ours.objects} == {str(p.relative_to(folder)) for p in folder.glob("*/shard_*.pt")}
    assert ours.others.keys() == {"common.pt", "metadata.json"}


@pytest.mark.parametrize("name", [PER_RANK, TORCH_DIST, ZARR])
def test_torch_files_are_read_inside_the_archive(tmp_path: Path, name: str) -> None:
    found = tar.open_tar(nemo(name, tmp_path))
    held = contents(tmp_path / f"{name}.nemo")
    torch_files = [name for name in held if name.endswith((".ckpt", ".pt"))]
    assert torch_files
    for member in torch_files:
        ours = torch_file.read(found.members[member], where=found.title(member), check=True)
        assert_same(ours, torch.load(io.BytesIO(held[member]), weights_only=False), member)


def test_archive_without_leading_dots_is_the_same(tmp_path: Path) -> None:
    path = nemo(PER_RANK, tmp_path)
    folder = extracted(path, tmp_path / "x")
    with tarfile.open(tmp_path / "plain.nemo", "w") as archive:
        for inner in sorted(folder.iterdir()):
            archive.add(inner, inner.name)
    found = tar.open_tar(tmp_path / "plain.nemo")
    same_members(found, contents(path))
    assert found.folders == tar.open_tar(path).folders


def test_files_below_a_folder() -> None:
    source = Source("x", 0, 1)
    found = tar.Tar("x", dict.fromkeys(("a/b/c", "ab/d", "a/e", "f"), source), frozenset({"a", "a/b", "ab"}))
    assert found.below("a").keys() == {"b/c", "e"}
    assert found.below("a/b").keys() == {"c"}
    assert found.below("b") == {}
    assert found.below("") == found.members


def test_unpacked_folder_is_the_same(tmp_path: Path) -> None:
    path = nemo(ZARR, tmp_path)
    folder = extracted(path, tmp_path / "x")
    found = tar.open_folder(folder)
    same_members(found, contents(path))
    assert found.folders == tar.open_tar(path).folders


def test_folder_may_link_inside_itself(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "y").symlink_to("a/x")
    found = tar.open_folder(tmp_path)
    same_members(found, {"a/x": b"1", "y": b"1"})
    assert found.title("a/x") == found.members["a/x"].path


LONG = "/".join(["f" * 30] * 5) + "/" + "n" * 120
NAMES = ("short", "with space", LONG, "ключ/ﬁle", "p" * 90 + "/" + "n" * 99, "a/b/c")
FORMATS: dict[str, Any] = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def many_files(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
    """Files of sizes about a block's."""
    held = {}
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held[name] = bytes([i + 1]) * (0, 511, 512, 513, 5000, 1)[i % 6]
        path.write_bytes(held[name])
    return held


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("arcname", [".", "top"])
def test_every_form_of_tarfile(tmp_path: Path, form: str, arcname: str) -> None:
    held = many_files(tmp_path / "in", tuple(name for name in NAMES if form != "ustar" or name != LONG))
    with tarfile.open(tmp_path / "x.tar", "w", format=FORMATS[form]) as archive:
        archive.add(tmp_path / "in", arcname=arcname)
    above = "" if arcname == "." else f"{arcname}/"
    same_members(tar.open_tar(tmp_path / "x.tar"), {above + name: content for name, content in held.items()})


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_every_form_of_gnu_tar(tmp_path: Path, form: str) -> None:
    most = {"v7": 90, "ustar": 250}.get(form, 1000)
    held = many_files(tmp_path / "in", tuple(name for name in NAMES if len(name) < most))
    subprocess.run(["tar", f"--format={form}", "-cf", "x.tar", "-C", "in", "."], cwd=tmp_path, check=True)
    same_members(tar.open_tar(tmp_path / "x.tar"), held)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_member_past_eight_gigabytes(tmp_path: Path, form: str) -> None:
    """The size stands in base 256 (GNU) or in a pax record; the data is a hole."""
    path, size = tmp_path / "x.tar", (9 << 30) + 5
    info = tarfile.TarInfo("large")
    info.size = size
    with path.open("wb") as out:
        head = out.write(info.tobuf(FORMATS[form]))
        out.seek(head + size + -size % 512)
        out.write(tarfile.TarInfo("after").tobuf() + bytes(1024))
    assert tar.open_tar(path).members == {
        "large": Source(str(path), head, size),
        "after": Source(str(path), path.stat().st_size - 1024, 0),
    }


def test_tar_inside_a_file_is_read_there(tmp_path: Path) -> None:
    path = nemo(TORCH_DIST, tmp_path)
    data = path.read_bytes()
    (tmp_path / "both").write_bytes(b"x" * 100 + data + b"y" * 10)
    found = tar.open_tar(Source(str(tmp_path / "both"), 100, len(data)), "both!inner")
    assert found.where == "both!inner"
    same_members(found, contents(path))


def test_empty_archive_has_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    assert tar.open_tar(tmp_path / "x.tar").members == {}


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"PK\3\4" * 300, b"x" * 512], ids=["none", "zero", "zip", "x"])
def test_other_files_are_no_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert not tar.is_tar(tmp_path / "x")


# -- gzip -------------------------------------------------------------------------------------------------------------


def test_gzipped_archive_is_unpacked_once(tmp_path: Path) -> None:
    path, scratch = nemo_gz(tmp_path), tmp_path / "deep" / "scratch"
    assert (gzipped.is_gzip(path), tar.is_tar(path)) == (True, False)
    made = gzipped.unpacked(path, scratch)
    assert made == gzipped.scratch_file(path, scratch)
    assert made.read_bytes() == gunzipped(path)
    same_members(tar.open_tar(made, str(path)), contents(path))
    inode = made.stat().st_ino
    assert gzipped.unpacked(path, scratch) == made
    assert made.stat().st_ino == inode
    assert list(scratch.iterdir()) == [made]


def test_tensors_of_gzipped_archive(tmp_path: Path) -> None:
    path = nemo_gz(tmp_path)
    found = tar.open_tar(gzipped.unpacked(path, tmp_path / "scratch"), str(path))
    theirs = torch.load(io.BytesIO(contents(path)["model_weights.ckpt"]), weights_only=False)
    assert_same(torch_file.read(found.members["model_weights.ckpt"]), theirs)
    assert found.title("x") == f"{tmp_path / GZIPPED}.nemo!x"


def test_unpacked_again_it_is_the_same_source(tmp_path: Path) -> None:
    """To a plan that was stopped and is continued, after someone tidied up."""
    path = nemo_gz(tmp_path)
    made = gzipped.unpacked(path, tmp_path / "scratch")
    before = identity(str(made))
    made.unlink()
    assert gzipped.unpacked(path, tmp_path / "scratch") == made
    assert identity(str(made)) == before


def test_changed_archive_is_unpacked_anew(tmp_path: Path) -> None:
    path = nemo_gz(tmp_path)
    made = gzipped.unpacked(path, tmp_path / "scratch")
    os.utime(path, ns=(1, 1))
    again = gzipped.unpacked(path, tmp_path / "scratch")
    assert again != made
    assert again.read_bytes() == made.read_bytes()


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    path = nemo_gz(tmp_path).rename(tmp_path / "x [1].nemo")
    name = gzipped.scratch_file(path, tmp_path).name
    left, live, other = (tmp_path / name for name in (f"{name}.a.part", f"{name}.b.part", "other.part"))
    for part in (left, live, other):
        part.write_bytes(b"half")
    with live.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        gzipped.unpacked(path, tmp_path)
    assert [part.exists() for part in (left, live, other)] == [False, True, True]


def test_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    path, scratch = nemo_gz(tmp_path), tmp_path / "scratch"
    size = len(gunzipped(path))
    with pytest.raises(FormatError, match=f"more than the {size - 1:,} bytes"):
        gzipped.unpacked(path, scratch, size - 1)
    assert list(scratch.iterdir()) == []
    assert gzipped.unpacked(path, scratch, size).stat().st_size == size


def test_scratch_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = nemo_gz(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PlanError, match=str(tmp_path / "file")):
        gzipped.unpacked(path, tmp_path / "file" / "scratch")
