"""Damaged and lying zip files: cut, flipped and edited, whoever wrote them; none is read as something else."""

from __future__ import annotations

import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckptconv.containers import torch_file, torch_write
from ckptconv.containers.pickled import Namespace
from ckptconv.dtypes import DTYPES
from ckptconv.leaves import full
from tests.unit.helpers.containers import attempt, flatten, refused, scarred, stored_zip, torch_zip, write

NONE = b"\x80\x02N."
SMALL = {"x/data.pkl": NONE, "x/byteorder": b"little", "x/version": b"3\n"}


def by_torch(folder: Path) -> Path:
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0), "n": [1, "text"]}, folder / "by_torch.pt")
    return folder / "by_torch.pt"


def by_us(folder: Path) -> Path:
    state = {"a": full((2, 3), DTYPES["fp32"], 1.5), "args": Namespace(tp=2), "c": full((4,), DTYPES["bf16"], 3)}
    return write(torch_write.layout("by_us.pt", state), folder)


def by_zipfile(folder: Path) -> Path:
    return stored_zip(SMALL | {"x/data/0": b"1234"}, folder / "by_zipfile.pt")


WRITERS: dict[str, Callable[[Path], Path]] = {"torch": by_torch, "ours": by_us, "zipfile": by_zipfile}


@pytest.mark.parametrize("cut", range(0, 100, 5))
@pytest.mark.parametrize("writer", WRITERS)
def test_truncated_file_is_refused(tmp_path: Path, writer: str, cut: int) -> None:
    path = WRITERS[writer](tmp_path)
    os.truncate(path, path.stat().st_size * cut // 100)
    with refused(path):
        torch_file.read(path)


def meaning(path: Path) -> str:
    return flatten(torch_file.read(path, check=True))


@pytest.mark.parametrize("bit", range(0, 8, 2))
@pytest.mark.parametrize("writer", WRITERS)
def test_flipped_bit_is_refused_or_means_nothing(tmp_path: Path, writer: str, bit: int) -> None:
    """One bit of every byte in turn: `check` finds it, or it is in padding, dates or versions and means nothing."""
    path = WRITERS[writer](tmp_path)
    data, expected = path.read_bytes(), meaning(path)
    harmless = 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position + bit) % 8
        path.write_bytes(flipped)
        found = attempt(path, meaning)
        harmless += found is not None
        assert found in (None, expected), position
    assert 0 < harmless < len(data)


@pytest.mark.parametrize("writer", WRITERS)
def test_flipped_bit_of_pickle_or_directory_is_refused_unchecked(tmp_path: Path, writer: str) -> None:
    """Without `check` too: what is read whole is always verified."""
    path = WRITERS[writer](tmp_path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [i for i in archive.infolist() if "/data/" not in i.filename and i.file_size]
    for info in names:
        name, extra = struct.unpack_from("<2H", data, info.header_offset + 26)
        begin = info.header_offset + 30 + name + extra
        for position in range(begin, begin + info.file_size):
            flipped = bytearray(data)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with refused(path, info.filename):
                torch_file.read(path)


def test_flipped_payload_is_found_by_check_alone(tmp_path: Path) -> None:
    path = by_torch(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 5.0))] ^= 1
    path.write_bytes(data)
    torch_file.read(path)
    with refused(path, "by_torch/data/0", "CRC32"):
        torch_file.read(path, check=True)


def test_bytes_before_the_first_record_are_refused(tmp_path: Path) -> None:
    """A zip file may be appended to anything, such as a record that its directory does not list."""
    path = tmp_path / "appended.pt"
    path.write_bytes(b"PK\3\4hidden")
    with zipfile.ZipFile(path, "a") as out:
        for name, content in SMALL.items():
            out.writestr(name, content)
    with refused(path, match="begins at 10, the record before it ends at 0"):
        torch_file.read(path)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_ends_in_a_value_or_a_refusal(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = WRITERS[rng.choice(list(WRITERS))](tmp_path)
    data = path.read_bytes()
    expected = flatten(torch_file.read(path))
    for _ in range(100):
        out = scarred(data, rng.randint(1, 40), rng)
        path.write_bytes(out)
        assert attempt(path, meaning) in (None, expected)


def archive(path: Path, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytearray:
    """A zip file's bytes, to edit."""
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in (records or SMALL | {"x/data/0": b"12345678"}).items():
            out.writestr(name, content)
    return bytearray(path.read_bytes())


def central(data: bytearray, name: str) -> int:
    """Where the directory's row for a member begins."""
    return data.rindex(name.encode()) - 46


def local(data: bytearray, name: str) -> int:
    return data.index(name.encode()) - 30


def poke(data: bytearray, at: int, form: str, *values: int) -> bytearray:
    struct.pack_into(form, data, at, *values)
    return data


def both(data: bytearray, name: str, offset: int, form: str, value: int) -> bytearray:
    """The same lie in the local header and (two bytes further on) in the directory."""
    return poke(poke(data, local(data, name) + offset, form, value), central(data, name) + offset + 2, form, value)


def end(data: bytearray) -> int:
    return data.rindex(b"PK\5\6")


D = "x/data/0"
EDITS: dict[str, Callable[[bytearray], bytearray]] = {
    "local-size-lies": lambda d: poke(d, local(d, D) + 22, "<I", 7),
    "directory-size-lies": lambda d: poke(d, central(d, D) + 24, "<I", 7),
    "sizes-lie-alike": lambda d: both(both(d, D, 18, "<I", 9), D, 22, "<I", 9),
    "sizes-lie-less": lambda d: both(both(d, D, 18, "<I", 7), D, 22, "<I", 7),
    "sizes-lie-hugely": lambda d: both(both(d, D, 18, "<I", 0xFFFFFFFE), D, 22, "<I", 0xFFFFFFFE),
    "stored-sizes-differ": lambda d: both(d, D, 22, "<I", 9),
    "size-needs-zip64": lambda d: both(d, D, 22, "<I", 0xFFFFFFFF),
    "offset-needs-zip64": lambda d: poke(d, central(d, D) + 42, "<I", 0xFFFFFFFF),
    "offset-of-another": lambda d: poke(d, central(d, D) + 42, "<I", 0),
    "offset-inside-another": lambda d: poke(d, central(d, D) + 42, "<I", 10),
    "offset-in-directory": lambda d: poke(d, central(d, D) + 42, "<I", central(d, "x/data.pkl")),
    "offset-outside": lambda d: poke(d, central(d, D) + 42, "<I", 1 << 30),
    "local-crc-lies": lambda d: poke(d, local(d, D) + 14, "<I", 1),
    "pickle-crc-lies": lambda d: both(d, "x/data.pkl", 14, "<I", 1),
    "byteorder-crc-lies": lambda d: both(d, "x/byteorder", 14, "<I", 1),
    "local-name-differs": lambda d: poke(d, local(d, D) + 30, "<B", ord("y")),
    "directory-name-differs": lambda d: poke(d, central(d, D) + 46, "<B", ord("y")),
    "name-length-lies": lambda d: poke(d, local(d, D) + 26, "<H", 7),
    "directory-name-too-long": lambda d: poke(d, central(d, D) + 28, "<H", 0xFFFF),
    "extra-length-lies": lambda d: poke(d, local(d, D) + 28, "<H", 4),
    "directory-extra-lies": lambda d: poke(d, central(d, D) + 30, "<H", 2),
    "comment-length-lies": lambda d: poke(d, central(d, D) + 32, "<H", 5),
    "encrypted": lambda d: both(d, D, 6, "<H", 1),
    "encrypted-strongly": lambda d: both(d, D, 6, "<H", 0x41),
    "unknown-flags": lambda d: both(d, D, 6, "<H", 0x20),
    "descriptor-announced": lambda d: both(d, D, 6, "<H", 8),
    "flags-differ": lambda d: poke(d, local(d, D) + 6, "<H", 0x800),
    "method-differs": lambda d: poke(d, local(d, D) + 8, "<H", 8),
    "method-unknown": lambda d: both(d, D, 8, "<H", 99),
    "other-disk": lambda d: poke(d, central(d, D) + 34, "<H", 1),
    "local-magic": lambda d: poke(d, local(d, D), "<I", 0),
    "directory-magic": lambda d: poke(d, central(d, D), "<I", 0),
    "several-disks": lambda d: poke(d, end(d) + 4, "<H", 1),
    "count-too-high": lambda d: poke(d, end(d) + 8, "<2H", 5, 5),
    "count-too-low": lambda d: poke(d, end(d) + 8, "<2H", 3, 3),
    "counts-differ": lambda d: poke(d, end(d) + 8, "<H", 3),
    "count-zero": lambda d: poke(d, end(d) + 8, "<2H", 0, 0),
    "directory-too-long": lambda d: poke(d, end(d) + 12, "<I", 0x7FFFFFFF),
    "directory-too-short": lambda d: poke(d, end(d) + 12, "<I", 46),
    "directory-elsewhere": lambda d: poke(d, end(d) + 16, "<I", 0),
    "directory-outside": lambda d: poke(d, end(d) + 16, "<I", 0x7FFFFFFF),
    "comment": lambda d: poke(d, end(d) + 20, "<H", 4) + b"text",
    "trailing-bytes": lambda d: d + b"\0",
    "leading-bytes": lambda d: bytearray(b"#!/bin/sh\n") + d,
    "bytes-between": lambda d: d[: local(d, D)] + b"hidden" + d[local(d, D) :],
    "bytes-before-directory": lambda d: d[: central(d, "x/data.pkl")] + b"gap" + d[central(d, "x/data.pkl") :],
    "end-record-missing": lambda d: d[: end(d)],
    "directory-missing": lambda d: d[: central(d, "x/data.pkl")],
    "two-end-records": lambda d: d + d[end(d) :],
    "zip64-locator-lies": lambda d: d[: end(d)] + struct.pack("<4sIQI", b"PK\6\7", 0, 1 << 40, 1) + d[end(d) :],
    "zip64-locator-to-nothing": lambda d: d[: end(d)] + struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1) + d[end(d) :],
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_zip_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(EDITS[name](archive(path)))
    with refused(path):
        torch_file.read(path)


def test_unedited_zip_is_read(tmp_path: Path) -> None:
    archive(tmp_path / "x.pt")
    assert torch_file.inspect(tmp_path / "x.pt", check=True).unused == (D,)


@pytest.mark.parametrize(
    "change",
    [(4, "<Q", 45), (16, "<I", 1), (20, "<I", 1), (24, "<Q", 1), (32, "<Q", 1), (40, "<Q", 1), (48, "<Q", 1)],
    ids=["length", "disk", "directory-disk", "count-here", "count", "directory-size", "directory-offset"],
)
def test_edited_zip64_end_is_refused(tmp_path: Path, change: tuple[int, str, int]) -> None:
    path = by_us(tmp_path)
    data = bytearray(path.read_bytes())
    offset, form, value = change
    path.write_bytes(poke(data, data.rindex(b"PK\6\6") + offset, form, value))
    with refused(path):
        torch_file.read(path)


NAMES = ["../x", "/x/data.pkl", "x/../y", "x\\y", "x//y", "x/./y", "./x", "x/\x01", "x/a\nb", ".."]


@pytest.mark.parametrize("name", NAMES)
def test_escaping_member_name_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    data = bytearray(stored_zip(SMALL | {"x/data/" + "#" * len(name): b"1"}, path).read_bytes())
    path.write_bytes(data.replace(b"x/data/" + b"#" * len(name), (name + "#" * 7).encode()[-7 - len(name) :]))
    with refused(path):
        torch_file.read(path)


def test_duplicate_member_is_refused(tmp_path: Path) -> None:
    path = stored_zip(SMALL | {"x/datb.pkl": NONE}, tmp_path / "x.pt")
    path.write_bytes(path.read_bytes().replace(b"datb", b"data"))
    with refused(path, "x/data.pkl", "twice"):
        torch_file.read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_member_is_refused(tmp_path: Path, method: int) -> None:
    archive(tmp_path / "x.pt", method=method)
    with refused(tmp_path / "x.pt", "x/data.pkl", "compressed|flags"):
        torch_file.read(tmp_path / "x.pt")


CONTENTS: dict[str, tuple[dict[str, bytes], str]] = {
    "big-endian": (SMALL | {"x/byteorder": b"big"}, "big-endian"),
    "byteorder-unknown": (SMALL | {"x/byteorder": b"middle"}, "byte order"),
    "version-missing": ({"x/data.pkl": NONE}, "version"),
    "version-new": (SMALL | {"x/version": b"11\n"}, "version"),
    "version-text": (SMALL | {"x/version": b"three\n"}, "version"),
    "version-zero": (SMALL | {"x/version": b"0\n"}, "version"),
    "script-constants": (SMALL | {"x/constants.pkl": NONE}, "TorchScript"),
    "script-code": (SMALL | {"x/code/__torch__.py": b"pass"}, "TorchScript"),
    "pickle-missing": ({"x/byteorder": b"little", "x/version": b"3\n"}, "missing"),
    "two-roots": (SMALL | {"y/data.pkl": NONE}, "folders"),
    "no-root": ({"data.pkl": NONE, "version": b"3\n"}, "folders"),
    "a-wheel": ({"pkg/__init__.py": b"", "pkg/version": b"1"}, "missing"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_zip_that_is_no_torch_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    records, problem = CONTENTS[name]
    path = stored_zip(records, tmp_path / "x.pt")
    with refused(path, match=problem):
        torch_file.read(path)


@pytest.mark.parametrize("size", [0, 1, 21, 22, 23, 64, 5000])
@pytest.mark.parametrize("fill", [b"\0", b"PK\3\4", b"\x80\x02", b"\xff"])
def test_other_files_are_refused(tmp_path: Path, size: int, fill: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes((fill * size)[:size])
    with refused(path):
        torch_file.read(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/zero")):
        with refused(path):
            torch_file.read(path)


def test_tar_file_is_refused_with_a_hint(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.nemo", "w") as out:
        out.add(by_torch(tmp_path), "model.ckpt")
    with refused(tmp_path / "x.nemo", match="tar"):
        torch_file.read(tmp_path / "x.nemo")


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    """A zip bomb of the kind where many members share their bytes."""
    path = tmp_path / "x.pt"
    data = archive(path)
    row = central(data, D)
    size = 46 + len(D)
    extra = data[row : row + size].replace(b"data/0", b"data/1")
    out = data[: end(data)] + extra + data[end(data) :]
    poke(out, end(out) + 8, "<2HI", 5, 5, end(out) - struct.unpack_from("<I", data, end(data) + 16)[0])
    path.write_bytes(out)
    with refused(path, "x/data/"):
        torch_file.read(path)


def test_pickle_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 100)
    path = torch_zip(b"\x80\x02" + b"N0" * 100 + b"N.", tmp_path / "x.pt")
    with refused(path, "x/data.pkl", "more than 100"):
        torch_file.read(path)
