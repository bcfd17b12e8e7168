"""Damaged files of before torch 1.6: they carry no checksums, so structure is all that can be held against itself."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import torch

from ckptconv.containers import torch_file, torch_legacy
from ckptconv.errors import FormatError
from tests.unit.helpers.containers import refused

P2 = b"\x80\x02"
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def saved(folder: Path) -> Path:
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2, dtype=torch.bfloat16), "n": [1, 2]}
    torch.save(state, folder / "x.pt", _use_new_zipfile_serialization=False)
    return folder / "x.pt"


def storage(numel: int = 2, window: bytes = b"N", key: str = "77") -> bytes:
    return (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K%c" % numel + window + b"tQ"
    )


def tensor(body: bytes, numel: int = 2) -> bytes:
    return P2 + b"ctorch._utils\n_rebuild_tensor\n(" + body + b"K\0K%c\x85K\1\x85tR." % numel


def file(
    path: Path,
    value: bytes = b"",
    protocol: object = 1001,
    system: object = None,
    keys: object = None,
    tail: bytes = b"",
) -> Path:
    """An old file, by hand: whatever is not given is as it should be."""
    parts = [torch_legacy.MAGIC, pickle.dumps(protocol, 2), pickle.dumps(SYSTEM if system is None else system, 2)]
    parts += [value or tensor(storage()), pickle.dumps(["77"] if keys is None else keys, 2)]
    path.write_bytes(b"".join(parts) + (tail or struct.pack("<q2f", 2, 1.5, 2.5)))
    return path


def test_honest_file_is_read(tmp_path: Path) -> None:
    value = torch_file.read(file(tmp_path / "x.pt"))
    assert value.numpy().tolist() == [1.5, 2.5]  # type: ignore[attr-defined]


def test_storage_that_is_a_window_of_another_is_read(tmp_path: Path) -> None:
    window = b"(" + text("9") + b"K\1K\1t"
    value = torch_file.read(file(tmp_path / "x.pt", tensor(storage(window=window), 1)))
    assert value.numpy().tolist() == [2.5]  # type: ignore[attr-defined]


@pytest.mark.parametrize("cut", range(0, 100, 4))
def test_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = saved(tmp_path)
    os.truncate(path, path.stat().st_size * cut // 100)
    with refused(path):
        torch_file.read(path)


LIES = {
    "protocol": {"protocol": 1002},
    "protocol-text": {"protocol": "1001"},
    "big-endian": {"system": SYSTEM | {"little_endian": False}},
    "system-empty": {"system": {"a": 1}},
    "system-a-list": {"system": [1]},
    "keys-missing": {"keys": []},
    "keys-unknown": {"keys": ["77", "78"]},
    "keys-twice": {"keys": ["77", "77"]},
    "keys-numbers": {"keys": [77]},
    "keys-a-dict": {"keys": {"77": 1}},
    "numel-lies": {"tail": struct.pack("<q2f", 3, 1, 2)},
    "numel-negative": {"tail": struct.pack("<q2f", -2, 1, 2)},
    "numel-huge": {"tail": struct.pack("<q2f", 1 << 62, 1, 2)},
    "payload-short": {"tail": struct.pack("<qf", 2, 1)},
    "payload-long": {"tail": struct.pack("<q3f", 2, 1, 2, 3)},
    "size-cut": {"tail": b"\2\0\0"},
    "window-outside": {"value": tensor(storage(window=b"(" + text("9") + b"K\1K\2t"), 1)},
    "window-negative": {"value": tensor(storage(window=b"(" + text("9") + b"J\xff\xff\xff\xffK\1t"), 1)},
    "window-text": {"value": tensor(storage(window=text("9")), 1)},
    "tensor-outside": {"value": tensor(storage(), 3)},
    "module-source": {"value": P2 + b"(" + text("module") + b"cm\nC\n" + text("f") + text("code") + b"tQ."},
    "code": {"value": P2 + b"cos\nsystem\n" + text("true") + b"\x85R."},
    "persistent-id-in-keys": {"keys": None, "value": P2 + text("a") + b"Q."},
    "endless-name": {"value": P2 + b"c" + b"a" * 5000},
    "text-length": {"value": P2 + b"X\xff\xff\xff\x7f"},
}


@pytest.mark.parametrize("name", LIES)
def test_lying_file_is_refused(tmp_path: Path, name: str) -> None:
    path = file(tmp_path / "x.pt", **LIES[name])  # type: ignore[arg-type]
    with refused(path):
        torch_file.read(path)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_ends_in_a_value_or_a_refusal(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), saved(tmp_path)
    data = path.read_bytes()
    for _ in range(150):
        out = bytearray(data)
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        path.write_bytes(out)
        with contextlib.suppress(FormatError):
            torch_file.read(path)
