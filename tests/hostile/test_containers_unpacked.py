"""Damaged gzip'ed archives and odd unpacked ones: refused by name, and nothing half-made is left."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptconv.containers import gzipped
from ckptconv.containers.tar import open_folder
from tests.unit.helpers.containers import refused


def gz(folder: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    data = bytearray(gzip.compress(random.Random(1).randbytes(20_000), 1))
    (folder / "x.nemo").write_bytes(change(data))
    return folder / "x.nemo"


DAMAGED: dict[str, Callable[[bytearray], bytes | bytearray]] = {
    "cut": lambda d: d[: len(d) // 2],
    "cut-by-one": lambda d: d[:-1],
    "cut-in-the-header": lambda d: d[:5],
    "no-trailer": lambda d: d[:-8],
    "flipped": lambda d: d[:6000] + bytes([d[6000] ^ 4]) + d[6001:],
    "sum-lies": lambda d: d[:-8] + bytes(4) + d[-4:],
    "length-lies": lambda d: d[:-4] + bytes(4),
    "bytes-after": lambda d: d + b"hidden",
    "second-part-cut": lambda d: d + d[:100],
    "no-deflate": lambda d: d[:10] + b"\xff" * 100,
    "method": lambda d: d[:2] + b"\7" + d[3:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_gzip_is_refused_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    path = gz(tmp_path, DAMAGED[name])
    with refused(path, match="damaged"):
        gzipped.unpacked(path, tmp_path / "scratch")
    assert list(tmp_path.glob("scratch/*")) == []


def test_every_truncation_of_a_gzip_is_refused(tmp_path: Path) -> None:
    data = gz(tmp_path, lambda d: d).read_bytes()
    for cut in range(0, len(data), 331):
        (tmp_path / "x.nemo").write_bytes(data[:cut])
        with refused(tmp_path / "x.nemo", match="damaged"):
            gzipped.unpacked(tmp_path / "x.nemo", tmp_path / "scratch")


def test_gzip_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    with refused(path, match="more than the 1,000,000 bytes"):
        gzipped.unpacked(path, tmp_path / "scratch", 1_000_000)
    assert list((tmp_path / "scratch").iterdir()) == []


# -- folders ----------------------------------------------------------------------------------------------------------


def in_folder(folder: Path, make: Callable[[Path], object]) -> Path:
    inner = folder / "x"
    (inner / "a").mkdir(parents=True)
    (inner / "a" / "file").write_bytes(b"1")
    make(inner)
    return inner


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link-out": (lambda f: (f / "l").symlink_to("/etc/passwd"), "l: is a link that leaves"),
    "link-up": (lambda f: (f / "a" / "l").symlink_to("../.."), "a/l: is a link that leaves"),
    "link-to-a-folder": (lambda f: (f / "l").symlink_to("a"), "not a regular file"),
    "link-to-itself": (lambda f: (f / "l").symlink_to("l"), "is a link to l, which is not there"),
    "link-to-nothing": (lambda f: (f / "l").symlink_to("nothing"), "is a link to nothing, which is not there"),
    "pipe": (lambda f: os.mkfifo(f / "p"), "p: is not a regular file"),
    "name": (lambda f: (f / "a\nb").write_bytes(b""), "not a plain relative path"),
    "name-no-text": (lambda f: Path(os.fsdecode(bytes(f) + b"/\xff")).write_bytes(b""), "not a plain relative path"),
    "deep": (lambda f: (f / "/".join("d" * 40)).mkdir(parents=True), "folders in each other"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_that_is_no_archive_is_refused(tmp_path: Path, name: str) -> None:
    make, problem = FOLDERS[name]
    folder = in_folder(tmp_path, make)
    with refused(folder, match=problem):
        open_folder(folder)


def test_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with refused(path, match="cannot be listed"):
            open_folder(path)
