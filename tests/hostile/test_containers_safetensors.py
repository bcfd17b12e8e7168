"""Damaged and lying safetensors headers: each is refused with the file, and the tensor where there is one, named."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ckptconv.containers import safetensors as st
from tests.unit.helpers.containers import attempt, refused


def saved(folder: Path) -> Path:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.int64(3)}
    safetensors.numpy.save_file(
        {k: np.asarray(v) for k, v in tensors.items()}, folder / "x.safetensors", {"format": "pt"}
    )
    return folder / "x.safetensors"


def file(folder: Path, header: object, body: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
    return path


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, object]:
    sizes = [b - a for a, b in (first, second)]
    return {name: entry("U8", (n,), at) for name, n, at in zip("ab", sizes, (first, second), strict=True)}


@pytest.mark.parametrize("cut", range(0, 100, 4))
def test_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = saved(tmp_path)
    os.truncate(path, path.stat().st_size * cut // 100)
    with refused(path):
        st.read(path)


ENTRIES: dict[str, Any] = {
    "dtype-unknown": entry("F33"),
    "dtype-sub-byte": entry("F4"),
    "dtype-complex": entry("C64"),
    "dtype-number": entry(32),
    "dtype-a-list": entry([]),
    "dtype-lower-case": entry("f32"),
    "shape-too-large": entry(shape=(2, 4)),
    "shape-too-small": entry(shape=(2, 2)),
    "shape-negative": entry(shape=(-2, -3)),
    "shape-float": entry(shape=(2.0, 3)),
    "shape-bool": entry(shape=(True, 6)),
    "shape-text": entry(shape="23"),
    "shape-null": entry(shape=None),
    "shape-huge": entry(shape=(1 << 62, 1 << 62)),
    "shape-huge-and-zero": entry(shape=(1 << 70, 0), offsets=(0, 0)),
    "offsets-reversed": entry(offsets=(24, 0)),
    "offsets-negative": entry(offsets=(-24, 0)),
    "offsets-one": entry(offsets=(24,)),
    "offsets-three": entry(offsets=(0, 24, 48)),
    "offsets-float": entry(offsets=(0, 24.0)),
    "offsets-huge": entry(offsets=(0, 1 << 70)),
    "offsets-hole-before": entry(offsets=(8, 32)),
    "missing-dtype": {"shape": [6], "data_offsets": [0, 24]},
    "missing-shape": {"dtype": "F32", "data_offsets": [0, 24]},
    "missing-offsets": {"dtype": "F32", "shape": [6]},
    "unknown-field": entry() | {"strides": [1]},
    "a-list": [],
    "a-text": "F32",
    "null": None,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_lying_entry_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = file(tmp_path, {"model.weight": ENTRIES[name]})
    with refused(path, "model.weight"):
        st.read(path)


HEADERS: dict[str, Any] = {
    "overlap": two((0, 14), (10, 24)),
    "hole": two((0, 10), (14, 24)),
    "same-range": two((0, 24), (0, 24)),
    "short-of-the-end": two((0, 10), (10, 20)),
    "beyond-the-end": two((0, 10), (10, 40)),
    "no-tensors-but-bytes": {},
    "metadata-not-a-table": {"__metadata__": [], "a": entry()},
    "metadata-not-texts": {"__metadata__": {"n": 1}, "a": entry()},
    "metadata-nested": {"__metadata__": {"n": {}}, "a": entry()},
    "a-list": [],
    "a-text": "text",
    "a-number": 42,
    "name-twice": b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},'
    b'"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
    "field-twice": b'{"a":{"dtype":"F32","dtype":"I32","shape":[6],"data_offsets":[0,24]}}',
    "metadata-twice": b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
    "not-json": b"{'a': 1}",
    "trailing-comma": b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},}',
    "trailing-text": b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}} x',
    "leading-space": b' {"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
    "nan": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}',
    "infinity": b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,Infinity]}}',
    "long-number": b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,24]}}',
    "not-utf8": b'{"\xff\xfe":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
    "byte-order-mark": b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
    "zeros": bytes(64),
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep-open": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_lying_header_is_refused(tmp_path: Path, name: str) -> None:
    path = file(tmp_path, HEADERS[name])
    with refused(path):
        st.read(path)


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_lying_header_length_is_refused(tmp_path: Path, length: int) -> None:
    path = saved(tmp_path)
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with refused(path):
        st.read(path)


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with refused(path, match="belong to no tensor"):
        st.read(path)


def meaning(path: Path) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(t.dtype.name, t.shape, t.numpy().tobytes()) for t in st.read(path).tensors.values()]


@pytest.mark.parametrize("bit", range(8))
def test_flipped_header_bit_is_refused_or_spares_the_tensors(tmp_path: Path, bit: int) -> None:
    """The format has no checksum, so a flip in a name or in metadata cannot be seen here; any other is."""
    path = saved(tmp_path)
    data, expected = path.read_bytes(), meaning(path)
    for position in range(8 + int.from_bytes(data[:8], "little")):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        assert attempt(path, meaning) in (None, expected), position


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_ends_in_a_value_or_a_refusal(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), saved(tmp_path)
    data = path.read_bytes()
    for _ in range(200):
        out = bytearray(data)
        at, n = rng.randrange(len(out)), rng.randint(1, 12)
        out[at : at + n] = rng.randbytes(rng.randint(0, 12))
        path.write_bytes(out)
        attempt(path, st.read)
