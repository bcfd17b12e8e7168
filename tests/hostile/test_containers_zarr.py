"""Damaged and lying zarr folders: each is refused, the array and the chunk named, without much memory or time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest

from ckptconv.containers import zarr2
from ckptconv.errors import FormatError
from ckptconv.source import Source

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "chunks": [2, 3],
    "compressor": None,
    "dtype": "<f4",
    "fill_value": None,
    "filters": None,
    "order": "C",
    "shape": [4, 5],
    "zarr_format": 2,
}
NAMES = ["0.0", "0.1", "1.0", "1.1"]
DATA = np.arange(24, dtype=np.float32).tobytes()  # what two rows of chunks would hold: 24 bytes a chunk


def array(folder: Path, chunk: bytes = DATA[:24], **changed: Any) -> Path:
    """A sound array but for what is changed (`...` leaves a field out)."""
    fields = {k: v for k, v in (GOOD | changed).items() if v is not ...}
    (folder / "some.weight").mkdir(parents=True)
    (folder / "some.weight" / ".zarray").write_text(json.dumps(fields))
    for name in NAMES:
        (folder / "some.weight" / name).write_bytes(chunk)
    return folder


@contextlib.contextmanager
def refused(folder: Path, match: str) -> Iterator[None]:
    """The block raises a FormatError of the folder, soon."""
    start = time.monotonic()
    with pytest.raises(FormatError, match=match) as caught:
        yield
    assert str(folder) in str(caught.value)
    assert time.monotonic() - start < 5


def test_the_undamaged_array_is_read(tmp_path: Path) -> None:
    assert zarr2.tensors(zarr2.read(array(tmp_path)))["some.weight"].shape == (4, 5)


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "format 3": ({"zarr_format": 3}, "zarr_format 3"),
    "format missing": ({"zarr_format": ...}, "zarr_format None"),
    "shape missing": ({"shape": ...}, "does not say shape"),
    "filters missing": ({"filters": ...}, "does not say filters"),
    "unknown field": ({"storage_transformers": []}, "says storage_transformers"),
    "big-endian": ({"dtype": ">f4"}, "big-endian"),
    "dtype void": ({"dtype": "<V2"}, "dtype '<V2'"),
    "dtype complex": ({"dtype": "<c8"}, "dtype '<c8'"),
    "dtype object": ({"dtype": "|O"}, r"dtype '\|O'"),
    "dtype structured": ({"dtype": [["a", "<f4"]]}, "expected one of"),
    "dtype number": ({"dtype": 4}, "dtype 4"),
    "more axes in shape": ({"shape": [4, 5, 6]}, "3 axes in chunks of 2"),
    "shape negative": ({"shape": [-4, 5]}, "has shape"),
    "shape float": ({"shape": [4.0, 5]}, "has shape"),
    "shape bool": ({"shape": [True, 5]}, "has shape"),
    "shape text": ({"shape": "45"}, "has shape"),
    "shape beyond 64 bits": ({"shape": [1 << 70, 5]}, "has shape"),
    "elements beyond 64 bits": ({"shape": [1 << 40, 1 << 40]}, "too large"),
    "many axes": ({"shape": [1] * 1000, "chunks": [1] * 1000}, "has shape"),
    "chunks zero": ({"chunks": [0, 3]}, "has chunks"),
    "chunks null": ({"chunks": None}, "has chunks"),
    "chunks huge": ({"chunks": [1 << 40, 1 << 40]}, "too large"),
    "chunks larger than files": ({"chunks": [4, 3]}, r"0\.0: has 24 bytes, expected 48"),
    "chunks smaller than files": ({"chunks": [2, 2]}, r"0\.0: has 24 bytes, expected 16"),
    "dtype wider": ({"dtype": "<f8"}, "expected 48"),
    "shape smaller than the grid": ({"shape": [2, 5]}, r"1\.0: is outside the grid of \[1, 2\]"),
    "shape empty": ({"shape": [0, 5]}, r"0\.0: is outside the grid"),
    "order unknown": ({"order": "K"}, "order 'K'"),
    "order a list": ({"order": []}, "order"),
    "separator unknown": ({"dimension_separator": "_"}, "dimension_separator"),
    "separator other": ({"dimension_separator": "/"}, r"0\.0: is no chunk"),
    "filters": ({"filters": [{"id": "delta", "dtype": "<f4"}]}, "filters"),
    "codec unknown": ({"compressor": {"id": "lzma"}}, "compressor"),
    "codec of pickles": ({"compressor": {"id": "pickle"}}, "compressor"),
    "codec a text": ({"compressor": "zlib"}, "compressor"),
    "codec without id": ({"compressor": {}}, "compressor"),
    "codec id a list": ({"compressor": {"id": ["zlib"]}}, "compressor"),
    "codec of a huge chunk": ({"compressor": {"id": "zlib"}, "chunks": [1 << 20, 1 << 20]}, "too large"),
    "fill text": ({"fill_value": "AAAA"}, "fill_value"),
    "fill bool": ({"fill_value": True}, "fill_value"),
    "fill list": ({"fill_value": [0]}, "fill_value"),
    "fill too large": ({"fill_value": 1e300}, "fill_value"),
    "fill endless": ({"fill_value": 10**400}, "fill_value"),
    "fill float for int": ({"dtype": "<i4", "fill_value": 0.5}, "fill_value"),
    "fill outside int": ({"dtype": "|u1", "chunks": [4, 6], "shape": [8, 12], "fill_value": 256}, "fill_value"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_header_is_refused(tmp_path: Path, name: str) -> None:
    changed, match = HEADERS[name]
    with refused(array(tmp_path, **changed), rf"some\.weight/[\s\S]*{match}"):
        zarr2.read(tmp_path)


TEXTS = {
    "empty": b"",
    "a list": b"[]",
    "cut": json.dumps(GOOD).encode()[:-5],
    "twice": b'{"order": "C", "order": "F"}',
    "NaN": json.dumps(GOOD | {"fill_value": float("nan")}).encode(),
    "deep": b"[" * 100_000,
    "large": b" " * (2 << 20),
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", TEXTS)
def test_header_that_is_no_json_table_is_refused(tmp_path: Path, name: str) -> None:
    (array(tmp_path) / "some.weight" / ".zarray").write_bytes(TEXTS[name])
    with refused(tmp_path, r"some\.weight/\.zarray"):
        zarr2.read(tmp_path)


def made(path: Path, content: str | None = None, link: str | None = None) -> None:
    """A file, a link, or a folder, in place of what is there."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    if link is not None:
        path.symlink_to(link)
    elif content is not None:
        path.write_text(content)
    else:
        path.mkdir()


def change(name: str, act: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: act(folder / "some.weight" / name)


def replaced(act: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in place of a chunk."""

    def both(path: Path) -> None:
        path.unlink()
        act(path)

    return change("0.1", both)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "chunk truncated": (change("0.1", lambda p: os.truncate(p, 23)), r"0\.1: has 23 bytes"),
    "chunk empty": (change("0.1", lambda p: os.truncate(p, 0)), r"0\.1: has 0 bytes"),
    "chunk longer": (change("0.1", lambda p: os.truncate(p, 25)), r"0\.1: has 25 bytes"),
    "chunk a folder": (replaced(lambda p: p.mkdir()), r"0\.1: is empty"),
    "chunk a folder with files": (replaced(lambda p: made(p / "x", "")), r"0\.1/x: is no chunk"),
    "chunk a pipe": (replaced(os.mkfifo), r"0\.1: is not a regular file"),
    "chunk a device": (replaced(lambda p: p.symlink_to("/dev/zero")), r"0\.1: is a link that leaves"),
    "chunk links outside": (replaced(lambda p: p.symlink_to("/etc/passwd")), r"0\.1: is a link that leaves"),
    "chunk links up": (replaced(lambda p: p.symlink_to("../../..")), r"0\.1: is a link that leaves"),
    "chunk links to nothing": (
        replaced(lambda p: p.symlink_to("gone")),
        r"0\.1: is a link to gone, which is not there",
    ),
    "chunk links to itself": (replaced(lambda p: p.symlink_to("0.1")), r"0\.1: is a link to 0\.1, which is not there"),
    "chunk links to a folder": (replaced(lambda p: p.symlink_to(".")), r"0\.1: is not a regular file"),
    "header links outside": (
        change(".zarray", lambda p: made(p, link="/etc/hostname")),
        r"\.zarray: is a link that leaves",
    ),
    "header a folder": (change(".zarray", made), r"\.zarray: is empty"),
    "header missing": (change(".zarray", os.unlink), r"some\.weight: holds 0\.0, but no \.zarray"),
    "chunk outside the grid": (change("2.0", lambda p: p.write_bytes(DATA[:24])), r"2\.0: is outside the grid"),
    "chunk far outside": (change(f"0.{10**18}", lambda p: p.write_bytes(b"x")), "is outside the grid"),
    "chunk spelled otherwise": (change("00.1", lambda p: p.write_bytes(DATA[:24])), r"00\.1: is no chunk"),
    "chunk in other digits": (change("\u0660.1", lambda p: p.write_bytes(DATA[:24])), "is no chunk"),
    "chunk with long number": (change("9" * 200, lambda p: p.write_bytes(b"x")), "is no chunk"),
    "chunk of fewer axes": (change("0", lambda p: p.write_bytes(DATA[:24])), "0: is no chunk"),
    "chunk half written": (change("0.0.1f2.partial", lambda p: p.touch()), "partial: is no chunk"),
    "a group": (change(".zgroup", lambda p: p.write_text('{"zarr_format": 2}')), r"\.zgroup: is no chunk"),
    "an array in an array": (
        change("inner", lambda p: made(p / ".zarray", json.dumps(GOOD))),
        r"inner/\.zarray: is no chunk",
    ),
    "a folder of nothing": (lambda f: (f / "other").mkdir(), "other: is empty"),
    "a folder linked from outside": (lambda f: (f / "other").symlink_to("/etc"), "other: is a link that leaves"),
    "a folder of other files": (lambda f: made(f / "o" / "x.pt", ""), r"o: holds x\.pt"),
    "locks of nothing": (lambda f: made(f / "o.sync" / "0", ""), r"o\.sync: holds 0"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_folder_is_refused(tmp_path: Path, name: str) -> None:
    act, match = FILES[name]
    act(array(tmp_path))
    with refused(tmp_path, match):
        zarr2.read(tmp_path)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    folder = array(tmp_path)
    os.truncate(folder / "some.weight" / "0.0", 3)
    (folder / "some.weight" / "7.7").touch()
    (folder / "empty").mkdir()
    with refused(tmp_path, r"empty: is empty[\s\S]*0\.0: has 3 bytes[\s\S]*7\.7: is outside"):
        zarr2.read(tmp_path)


def test_link_to_a_file_of_the_same_folder_is_followed(tmp_path: Path) -> None:
    folder = array(tmp_path) / "some.weight"
    (folder / "0.1").unlink()
    (folder / "0.1").symlink_to("0.0")
    assert zarr2.tensors(zarr2.read(tmp_path))["some.weight"].numpy()[0, 3] == 0


@pytest.mark.parametrize("shape", [[1 << 60], [1 << 20] * 3])
@pytest.mark.parametrize("there", [False, True])
def test_endless_grid_costs_nothing(tmp_path: Path, shape: list[int], there: bool) -> None:
    """More chunks than can be counted, of which one is there, or none: the rest is a few constants."""
    folder = tmp_path / "key"
    folder.mkdir()
    header = GOOD | {"shape": shape, "chunks": [1] * len(shape), "dtype": "|u1"}
    (folder / ".zarray").write_text(json.dumps(header))
    if there:
        (folder / ".".join(["5"] * len(shape))).write_bytes(b"x")
    with refused(tmp_path, "key: .* chunks are not there"):
        zarr2.tensors(zarr2.read(tmp_path))
    tensor = zarr2.tensors(zarr2.read(tmp_path), missing="zero")["key"]
    assert len(tensor.lower()) == (1 + 2 * len(shape) if there else 1)
    (folder / ".zarray").write_text(json.dumps(header | {"fill_value": 7}))
    tensor = zarr2.tensors(zarr2.read(tmp_path))["key"]
    corner = tensor
    for axis in range(len(shape)):
        corner = corner.narrow(axis, 4, 6)
    assert corner.numpy().reshape(-1)[0] == 7
    assert corner.numpy().reshape(-1)[-1] == (ord("x") if there else 7)


def encoded(codec: str, data: bytes) -> bytes:
    if codec == "gzip":
        return gzip.compress(data)
    return zlib.compress(data, 9) if codec == "zlib" else bytes(numcodecs.get_codec({"id": codec}).encode(data))


def decode(folder: Path) -> Any:
    return zarr2.tensors(zarr2.read(folder))["some.weight"].numpy()


CODECS = ["blosc", "bz2", "gzip", "zlib", "zstd"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [0, 1, 23, 25, 48, 1 << 16])
def test_decoded_size_must_be_the_one_of_the_header(tmp_path: Path, codec: str, size: int) -> None:
    array(tmp_path, encoded(codec, bytes(size)), compressor={"id": codec})
    with refused(tmp_path, r"0\.0: (does not decode as|decodes to)"):
        decode(tmp_path)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", ["cut", "longer", "other", "noise", "empty"])
def test_damaged_compressed_chunk_is_refused(tmp_path: Path, codec: str, damage: str) -> None:
    good = encoded(codec, DATA[:24])
    other = encoded("zlib" if codec == "zstd" else "zstd", DATA[:24])
    noise = random.Random(1).randbytes(60)
    chunk = {"cut": good[: len(good) // 2], "longer": good + b"x", "other": other, "noise": noise, "empty": b""}[damage]
    array(tmp_path, chunk, compressor={"id": codec})
    with refused(tmp_path, re.escape("0.0: ")):
        decode(tmp_path)


def test_compressed_file_larger_than_any_encoder_makes_is_refused(tmp_path: Path) -> None:
    array(tmp_path, bytes(1 << 20), compressor={"id": "zlib"})
    with refused(tmp_path, r"0\.0: has 1,048,576 bytes, which cannot be a compressed chunk of 24"):
        zarr2.read(tmp_path)


def test_compressed_file_that_shrinks_afterwards_is_refused(tmp_path: Path) -> None:
    array(tmp_path, encoded("zlib", DATA[:24]), compressor={"id": "zlib"})
    tensor = zarr2.tensors(zarr2.read(tmp_path))["some.weight"]
    os.truncate(tmp_path / "some.weight" / "1.0", 5)
    with refused(tmp_path, r"1\.0: ends at byte 5"):
        tensor.numpy()


@pytest.mark.parametrize("name", ["../x/.zarray", "/etc/passwd", "a/../../b", "./x/y", "a//b", "a/"])
def test_names_of_an_archive_lead_nowhere(name: str) -> None:
    """Names are only compared; what is not an array or an object of one is refused."""
    with pytest.raises(FormatError):
        zarr2.interpret("a.nemo", {name: Source("/dev/null", 0, 0)})


TAKES = """
import sys
from pathlib import Path
import numpy, tensorstore
from ckptconv.containers import zarr2
from ckptconv.errors import FormatError
from ckptconv.executor.execute import peak_memory
from ckptconv.moves import Reader
tensor = zarr2.tensors(zarr2.read(Path(sys.argv[1])))["some.weight"]
before, moves, out = peak_memory(), tensor.lower(), numpy.empty(1 << 20, numpy.uint8)
with Reader() as reader:
    try:
        for at in range(0, tensor.nbytes, len(out)):
            reader.fill(moves, out[:tensor.nbytes - at], at)
        told = "read"
    except FormatError:
        told = "refused"
print(told, (peak_memory() - before) >> 20)
"""


def taken(folder: Path) -> tuple[str, int]:
    """How reading the array ended in a fresh process, and the megabytes it took more than opening it."""
    command = [sys.executable, "-c", TAKES, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=env)
    told, megabytes = done.stdout.split()
    return told, int(megabytes)


@pytest.mark.parametrize("codec", CODECS)
def test_bomb_takes_no_memory(tmp_path: Path, codec: str) -> None:
    """A small file that would become hundreds of megabytes, where a chunk of 24 bytes is expected."""
    small = {"zlib": 50 << 20, "gzip": 50 << 20}  # these reach a thousandth at best, and files are limited too
    zeros = bytes(small.get(codec, 400 << 20))
    bomb = bytes(numcodecs.Blosc("zstd", 9).encode(zeros)) if codec == "blosc" else encoded(codec, zeros)
    array(tmp_path, bomb, compressor={"id": codec})
    told, megabytes = taken(tmp_path)
    assert told == "refused"
    assert megabytes < 30


def test_decoded_chunks_do_not_pile_up(tmp_path: Path) -> None:
    """320 MB in chunks of 8 MB, of which a reader holds one, and a few copies while it decodes it."""
    rows = 40
    noise = np.random.default_rng(1).integers(0, 255, 2 << 20, np.uint8).tobytes() * 4
    packed = zlib.compress(noise, 1)
    folder = array(tmp_path, compressor={"id": "zlib"}, shape=[rows, 8 << 20], chunks=[1, 8 << 20], dtype="|u1")
    for name in NAMES:
        (folder / "some.weight" / name).unlink()
    for row in range(rows):
        (folder / "some.weight" / f"{row}.0").write_bytes(packed)
    told, megabytes = taken(tmp_path)
    assert told == "read"
    assert megabytes < 100
