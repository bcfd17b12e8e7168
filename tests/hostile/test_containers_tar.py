"""Damaged, lying and hostile tar archives: one error that names the archive and lists what is wrong; nothing is unpacked."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckptconv.containers import gzipped, tar, torch_file
from ckptconv.containers.tar import open_tar
from ckptconv.errors import FormatError
from ckptconv.source import Source
from tests.unit.helpers.containers import attempt, refused, scarred, torch_zip

NAME, SIZE, SUM, KIND, MAGIC, PREFIX = 0, 124, 148, 156, 257, 345
SAFE = 2 * 512  # of zeros, which end an archive
PAX, GNU = tarfile.PAX_FORMAT, tarfile.GNU_FORMAT


def member(name: str = "x", content: bytes = b"data", form: Any = PAX, **fields: Any) -> bytes:
    """Header and data, padded; `kind` and others as tarfile's fields; `size` may lie."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form) + content + bytes(-len(content) % 512)


def poked(block: bytes, at: int, value: bytes) -> bytes:
    """A header that says something else, its checksum right."""
    out = bytearray(block)
    out[at : at + len(value)] = value
    out[SUM : SUM + 8] = b" " * 8
    out[SUM : SUM + 8] = b"%06o\0 " % sum(out[:512])
    return bytes(out)


def archive(folder: Path, *members: bytes, end: bytes = bytes(SAFE)) -> Path:
    path = folder / "x.nemo"
    path.write_bytes(b"".join(members) + end)
    return path


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header before the next member."""
    content = b"".join(records)
    return member("pax", content, type=kind)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def by_tarfile(folder: Path, form: Any = PAX) -> Path:
    """Files, a folder, a long name, times of fractions of a second."""
    path = folder / "x.nemo"
    with tarfile.open(path, "w", format=form) as out:
        for name, content in {"./a/x": b"1234", "./b": b"", "./a/" + "n" * 120: b"z" * 700}.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if form == PAX else 1
            out.addfile(info, io.BytesIO(content))
    return path


def meaning(path: Path) -> object:
    return {name: tuple(source[1:3]) for name, source in open_tar(path).members.items()}


@pytest.mark.parametrize("form", [PAX, GNU], ids=["pax", "gnu"])
def test_truncated_archive_is_refused(tmp_path: Path, form: Any) -> None:
    """At every length; only zeros past the two blocks that end it may be missing."""
    path = by_tarfile(tmp_path, form)
    data, expected = path.read_bytes(), meaning(path)
    end = len(data.rstrip(b"\0"))
    end += -end % 512 + SAFE
    for cut in [*range(0, len(data), 256), end - 1, end, end + 1]:
        path.write_bytes(data[:cut])
        if cut >= end:
            assert meaning(path) == expected
        else:
            with refused(path, match="truncated|begins|ends"):
                open_tar(path)


@pytest.mark.parametrize("form", [PAX, GNU], ids=["pax", "gnu"])
def test_flipped_bit_is_refused_or_means_nothing(tmp_path: Path, form: Any) -> None:
    """One bit of every byte: in a header its checksum tells; data, and what pads it, is not a matter of the archive."""
    path = by_tarfile(tmp_path, form)
    data, expected = path.read_bytes(), meaning(path)
    texts = [(at, at + 512) for at in range(0, len(data), 512) if b"@PaxHeader" in data[at : at + 20]]
    texts += [(at, at + 512) for at in range(0, len(data), 512) if b"@LongLink" in data[at : at + 20]]
    unsummed = {i for start, end in texts for i in range(end, end + 512)}  # names and times that nothing protects
    harmless, zeros = 0, len(data.rstrip(b"\0")) + 1500
    for position in (*range(zeros), *range(zeros, len(data), 50)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        found = attempt(path, meaning)
        harmless += found is not None
        assert found in (None, expected) or position in unsummed, position
    assert 0 < harmless < len(data)


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_ends_in_members_or_a_refusal(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = by_tarfile(tmp_path, rng.choice([PAX, GNU]))
    data = path.read_bytes()
    for _ in range(200):
        out = scarred(data, rng.choice([1, 8, 40, 512, 1024]), rng)
        path.write_bytes(out)
        found = attempt(path, meaning)
        inside = found if isinstance(found, dict) else {}
        assert all(start + size <= len(out) for start, size in inside.values())


HEADERS: dict[str, tuple[bytes, str]] = {
    "sum-lies": (member()[:SUM] + b"000001\0 " + member()[SUM + 8 :], "checksum says 1"),
    "sum-missing": (member()[:SUM] + b" " * 8 + member()[SUM + 8 :], "no number for its checksum"),
    "magic": (poked(member(), MAGIC, b"rhubarb\0"), "unknown form"),
    "size-too-large": (poked(member(), SIZE, b"77777777777\0"), "runs past the end"),
    "size-one-block-more": (poked(member(), SIZE, b"%011o\0" % 2048), "runs past the end"),
    "size-negative": (poked(member(), SIZE, b"-0000000004\0"), "no number for its size"),
    "size-text": (poked(member(), SIZE, b"0x000000004\0"), "no number for its size"),
    "size-grouped": (poked(member(), SIZE, b"00000_00004\0"), "no number for its size"),
    "size-blank": (poked(member(), SIZE, bytes(12)), "no number for its size"),
    "size-binary-huge": (poked(member(), SIZE, b"\xbf" + b"\xff" * 11), "cannot be"),
    "size-binary-negative": (poked(member(), SIZE, b"\xff" * 12), "cannot be"),
    "size-binary-past": (poked(member(), SIZE, b"\x80" + (1 << 40).to_bytes(11, "big")), "runs past the end"),
    "size-into-the-end": (poked(member(), SIZE, b"%011o\0" % 1024), "one block of zeros|without the two blocks"),
    "size-smaller": (poked(member(content=b"d" * 600), SIZE, b"%011o\0" % 500), "header at 1024"),
    "pax-size-past": (pax(record(b"size", b"99999")) + member(), "runs past the end"),
    "pax-size-negative": (pax(record(b"size", b"-4")) + member(), "not understood"),
    "pax-size-huge": (pax(record(b"size", b"9" * 19)) + member(), "not understood"),
    "pax-size-long": (pax(record(b"size", b"9" * 5000)) + member(), "not understood"),
    "pax-length-lies": (pax(b"99 path=y\n") + member(), "damaged at its byte 0"),
    "pax-length-short": (pax(b"4 path=y\n") + member(), "damaged at its byte 0"),
    "pax-length-huge": (pax(b"9" * 400 + b" path=y\n") + member(), "damaged at its byte 0"),
    "pax-length-zero": (pax(b"0 path=y\n") + member(), "damaged at its byte 0"),
    "pax-no-newline": (pax(b"9 path=yz") + member(), "damaged at its byte 0"),
    "pax-no-value": (pax(b"7 path\n") + member(), "not understood"),
    "pax-second-damaged": (pax(record(b"mtime", b"1") + b"garbage") + member(), "damaged at its byte 11"),
    "pax-unknown": (pax(record(b"pazh", b"y")) + member(), "not understood: b'pazh=y'"),
    "pax-sparse": (pax(record(b"GNU.sparse.name", b"y")) + member(), "not understood"),
    "pax-charset": (pax(record(b"hdrcharset", b"BINARY")) + member(), "not understood"),
    "pax-for-nothing": (member() + pax(record(b"path", b"y")), "that does not follow"),
    "pax-twice": (pax(record(b"path", b"y")) + pax(record(b"path", b"z")) + member(), "named before"),
    "pax-global-name": (pax(record(b"path", b"y"), kind=tarfile.XGLTYPE) + member(), "more than one"),
    "pax-global-size": (pax(record(b"size", b"0"), kind=tarfile.XGLTYPE) + member(), "more than one"),
    "long-name-twice": (member("L", b"a\0", type=b"L") * 2 + member(), "named before"),
    "long-name-for-nothing": (member() + member("L", b"a\0", type=b"L"), "that does not follow"),
    "end-at-once": (bytes(512) + member(), "one block of zeros at 0"),
    "end-in-between": (member() + bytes(512) + member(), "one block of zeros at 1024"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_header_is_refused(tmp_path: Path, name: str) -> None:
    content, problem = HEADERS[name]
    path = archive(tmp_path, content)
    with refused(path, match=problem):
        open_tar(path)


KINDS = {
    "hard link": b"1", "symbolic link": b"2", "device": b"3", "a device": b"4", "pipe": b"6", "sparse file": b"S",
    "several volumes": b"M", "label": b"V", "dump": b"D", "of kind b'Q'": b"Q",
}  # fmt: skip


@pytest.mark.parametrize("what", KINDS)
def test_other_kinds_are_refused_by_name(tmp_path: Path, what: str) -> None:
    odd = poked(member("odd/one", b"", linkname="/etc/passwd"), KIND, KINDS[what])
    path = archive(tmp_path, member("a"), odd, member("b"))
    with refused(path, match=f"odd/one: is .*{what}"):
        open_tar(path)


def test_real_links_and_devices_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "file").write_bytes(b"1")
    (folder / "soft").symlink_to("file")
    (folder / "hard").hardlink_to(folder / "file")
    os.mkfifo(folder / "pipe")
    with tarfile.open(tmp_path / "x.nemo", "w") as out:
        out.add(folder, ".")
    with pytest.raises(FormatError) as caught:
        open_tar(tmp_path / "x.nemo")
    for part in ("soft: is a symbolic link", "pipe: is a pipe", ": is a hard link"):
        assert part in str(caught.value)


NAMES = [
    "/etc/passwd", "//x", "/", "..", "../x", "a/../../x", "a/..", "./../x", ".//x", "a//b", "a/./b", "a\\b", "a\nb", "a\x01",
    "a\u202eb", "x" * 5000, "a/" * 40 + "x", "", ".", "./", "a/",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:20]))
@pytest.mark.parametrize("form", [PAX, GNU], ids=["pax", "gnu"])
def test_name_that_is_no_plain_path_is_refused(tmp_path: Path, name: str, form: Any) -> None:
    path = archive(tmp_path, member("before"), member(name, form=form))
    with refused(path, match="not a plain relative path|folders in each other|name of a folder"):
        open_tar(path)


def test_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, poked(member(), NAME, b"\xff\xfe"))
    with refused(path, match="not text in UTF-8"):
        open_tar(path)


def test_prefix_may_not_climb_out(tmp_path: Path) -> None:
    path = archive(tmp_path, poked(member("x"), PREFIX, b"../up"))
    with refused(path, match="plain relative path"):
        open_tar(path)


@pytest.mark.parametrize("second", ["x", "./x", "././x"])
def test_two_members_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    path = archive(tmp_path, member("x", b"first"), member(second, b"second"))
    with refused(path, match="x: is there twice"):
        open_tar(path)


@pytest.mark.parametrize("order", [1, -1])
def test_file_in_a_file_is_refused(tmp_path: Path, order: int) -> None:
    path = archive(tmp_path, *[member("a/b"), member("a/b/c/d")][::order])
    with refused(path, match="a/b: is a file and a folder too"):
        open_tar(path)


def test_folder_with_data_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, poked(member("d", b"data"), KIND, b"5"))
    with refused(path, match="d: is a folder, yet takes 4 bytes"):
        open_tar(path)


def test_all_that_is_wrong_is_in_one_error(tmp_path: Path) -> None:
    soft = member("soft", b"", type=b"2", linkname="x")
    path = archive(tmp_path, member("../up"), soft, member("x"), member("x"), poked(member("y"), SIZE, b"7" * 11))
    with pytest.raises(FormatError, match="4 things are wrong") as caught:
        open_tar(path)
    for part in ("'../up'", "soft: is a symbolic link", "x: is there twice", "runs past the end"):
        assert part in str(caught.value)


ENDS: dict[str, tuple[bytes, str]] = {
    "none": (b"", "without the two blocks"),
    "one-block": (bytes(512), "one block of zeros"),
    "one-block-and-a-bit": (bytes(1000), "one block of zeros"),
    "part-of-a-block": (bytes(100), "without the two blocks"),
    "bytes-after": (bytes(SAFE) + b"hidden", "bytes other than zeros follow"),
    "bytes-far-after": (bytes(SAFE + 3_000_000) + b"!", "bytes other than zeros follow"),
    "another-archive": (bytes(SAFE) + member("x", b"another") + bytes(SAFE), "two archives joined"),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    end, problem = ENDS[name]
    path = archive(tmp_path, member(), end=end)
    with refused(path, match=problem):
        open_tar(path)


@pytest.mark.parametrize("nbytes", [SAFE, SAFE + 1, 10240 - 1024, 1 << 20])
def test_zeros_after_the_end_are_no_matter(tmp_path: Path, nbytes: int) -> None:
    assert open_tar(archive(tmp_path, member(), end=bytes(nbytes))).members.keys() == {"x"}


def test_endless_zeros_are_refused_unread(tmp_path: Path) -> None:
    path = archive(tmp_path, member())
    os.truncate(path, 1 << 42)
    with refused(path, match="bytes follow"):
        open_tar(path)


def test_bombs_of_headers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_MEMBERS", 100)
    path = archive(tmp_path, *(member(f"{i}", b"") for i in range(101)))
    with refused(path, match="more than 100 members"):
        open_tar(path)
    path = archive(tmp_path, member("L", b"n" * (2 << 20), type=b"L") + member())
    with refused(path, match="extended header at 512 has 2,097,152 bytes"):
        open_tar(path)
    path = archive(tmp_path, member("L", b"./" * (1 << 18) + b"x", type=b"L") + member())
    with refused(path, match="not a plain relative path"):
        open_tar(path)
    path = archive(tmp_path, pax(record(b"comment", b"c" * (2 << 20))) + member())
    with refused(path, match="extended header"):
        open_tar(path)


@pytest.mark.parametrize("fill", [b"", b"x", b"\x1f\x8b\x08\0", b"PK\3\4", b"\x80\x02"])
def test_other_files_are_refused(tmp_path: Path, fill: bytes) -> None:
    path = tmp_path / "x.nemo"
    path.write_bytes(fill * 600)
    with refused(path):
        open_tar(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/zero")):
        for act in (open_tar, tar.is_tar, gzipped.is_gzip, lambda p: gzipped.unpacked(p, tmp_path / "scratch")):
            with refused(path):
                act(path)


def test_damaged_member_is_named_with_its_archive(tmp_path: Path) -> None:
    inner = torch_zip(b"\x80\x02N.", tmp_path / "x.pt").read_bytes()
    path = archive(tmp_path, member("mp_rank_00/model_weights.ckpt", inner[:-30]))
    found = open_tar(path)
    name = "mp_rank_00/model_weights.ckpt"
    with refused(path, name, "zip end record"):
        torch_file.read(found.members[name], where=found.title(name))


def test_member_past_the_end_of_a_range_is_refused(tmp_path: Path) -> None:
    """An archive inside a larger file may not reach into what follows it there."""
    data = poked(member(), SIZE, b"%011o\0" % 3000)
    (tmp_path / "x.nemo").write_bytes(data + bytes(10_000))
    with refused(tmp_path / "x.nemo", match="runs past the end at 2048"):
        open_tar(Source(str(tmp_path / "x.nemo"), 0, 2048))
