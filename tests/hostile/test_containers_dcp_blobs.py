"""Damaged, lying and hostile blobs in the .distcp files of a torch distributed checkpoint, the first of a shape and later ones."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckptconv.assemble import Box
from ckptconv.containers import dcp
from ckptconv.errors import FormatError
from tests.hostile.damage_dcp import W2, Evil, made, refused
from tests.unit.helpers.containers import flatten
from tests.unit.helpers.dcp import handmade


def other_blob(folder: Path, content: bytes) -> Path:
    """The checkpoint with other bytes where the second chunk of `w` is said to lie: in a file of their own."""

    def edit(m: Any) -> None:
        m.storage_data[W2] = _StorageInfo("__1_0.distcp", 0, len(content))

    made(folder, edit)
    (folder / "__1_0.distcp").write_bytes(content)
    return folder


def saved(value: object) -> bytes:
    blob = io.BytesIO()
    torch.save(value, blob)
    return blob.getvalue()


BLOBS: dict[str, tuple[bytes, str]] = {
    "shape": (saved(torch.zeros(3, 2)), "of shape (3, 2), .metadata says fp32 of shape (2, 3)"),
    "larger": (saved(torch.zeros(4, 3)), "of shape (4, 3)"),
    "dtype": (saved(torch.zeros(2, 3, dtype=torch.bfloat16)), "holds bf16"),
    "same-bytes-other-dtype": (saved(torch.zeros(2, 3, dtype=torch.int32)), "holds int32"),
    "list": (saved([torch.zeros(2, 3)]), "not a tensor"),
    "none": (saved(None), "not a tensor"),
    "zeros": (bytes(1000), "not a torch file"),
    "one-byte": (b"P", "not a torch file"),
    "metadata": (pickle.dumps({}), "not a torch file"),
    "trailing": (saved(torch.zeros(2, 3)) + b"x", "zip end record"),
    "cut": (saved(torch.zeros(2, 3))[:-1], "zip end record"),
    "cut-at-the-start": (saved(torch.zeros(2, 3))[1:], "not a torch file"),
    "two": (saved(torch.zeros(2, 3)) * 2, ""),
}


@pytest.mark.parametrize("name", BLOBS)
def test_lying_blob_is_refused_by_place_and_key(tmp_path: Path, name: str) -> None:
    content, problem = BLOBS[name]
    folder = other_blob(tmp_path, content)
    found = dcp.read(folder)
    with refused(folder, f"__1_0.distcp!0+{len(content)}", problem, "(w)"):
        dcp.tensors(found)


def test_all_lying_blobs_are_listed(tmp_path: Path) -> None:
    folder = made(tmp_path)
    found = dcp.read(folder)
    path = folder / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with refused(folder, "(w)", "(b)", match="3 things are wrong"):
        dcp.tensors(found)


def test_hostile_blob_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = other_blob(tmp_path / "x", saved(Evil(os.system, f"touch {mark}")))
    with refused(folder, "__1_0.distcp!0+", "system"):
        dcp.tensors(dcp.read(folder))
    assert not mark.exists()


def test_hostile_object_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    folder = handmade(tmp_path / "x", {}, {"o": [Evil(os.system, f"touch {mark}")]})
    with refused(folder, "__0_0.distcp!0+", "system"):
        dcp.value(dcp.read(folder).objects["o"])
    assert not mark.exists()


def test_file_that_shrank_after_it_was_read_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path)
    found = dcp.read(folder)
    os.truncate(folder / "__0_0.distcp", 100)
    with refused(folder, "__0_0.distcp"):
        dcp.tensors(found)
    with refused(folder, "__0_0.distcp"):
        dcp.value(found.objects["o"])


# -- blobs that look like one already seen ----------------------------------------------------------------------------


def many(folder: Path) -> Path:
    """Six chunks of one shape, of different values: all but the first are held against the first."""
    boxes: list[Box] = [((i, i + 1), (0, 4)) for i in range(6)]
    return handmade(folder, {"w": (torch.arange(24.0).reshape(6, 4), boxes)})


@pytest.mark.parametrize(("which", "bit"), [(1, 0), (5, 3), (3, 6)])
def test_flipped_bit_of_a_later_blob_is_found_as_in_the_first(tmp_path: Path, which: int, bit: int) -> None:
    """Every byte in turn: a blob known by its likeness is refused where it would be when parsed alone."""
    folder = many(tmp_path)
    found = dcp.read(folder)
    item = found.tensors["w"].chunks[which].item
    path = Path(item.path)
    data, expected = path.read_bytes(), flatten(dcp.tensors(found))
    body = data.index(struct.pack("<4f", *range(4 * which, 4 * which + 4)))
    for position in range(item.offset, item.offset + item.nbytes):
        if body <= position < body + 16:
            continue
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position + bit) % 8
        path.write_bytes(flipped)
        after_others, alone = meaning(found), meaning(only(found, which))
        assert (after_others is None) == (alone is None), position
        assert after_others in (None, expected), position


def only(found: dcp.Dcp, which: int) -> dcp.Dcp:
    """One chunk as a checkpoint of its own, so that no other is parsed before it."""
    entry = found.tensors["w"]
    chunk = entry.chunks[which]
    alone = dcp.Entry(entry.dtype, chunk.shape, (dcp.Chunk((0, 0), chunk.shape, chunk.item),))
    return replace(found, tensors={"w": alone})


def meaning(found: dcp.Dcp) -> str | None:
    """The tensors, or None where they are refused."""
    try:
        return flatten(dcp.tensors(found))
    except FormatError:
        return None


def everything(folder: Path) -> str:
    """All that a folder means, as text."""
    found = dcp.read(folder)
    values = {key: dcp.value(item) for key, item in found.objects.items()}
    return flatten([dcp.tensors(found), values, [s[1:3] for s in found.unused]])


def attempt(folder: Path) -> str | FormatError:
    """What the folder means, or why it is refused; any other error comes through."""
    try:
        return everything(folder)
    except FormatError as error:
        return error


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_ends_in_a_value_or_a_refusal(tmp_path: Path, seed: int) -> None:
    rng, folder = random.Random(seed), made(tmp_path, files=2)
    names = [".metadata", "__0_0.distcp", "__1_0.distcp"]
    clean = {name: (folder / name).read_bytes() for name in names}
    for _ in range(120):
        name = rng.choice(names)
        out = bytearray(clean[name])
        at, n = rng.randrange(len(out)), rng.randint(1, 12)
        out[at : at + n] = rng.randbytes(rng.choice([n, n, rng.randint(0, 12)]))
        (folder / name).write_bytes(out)
        found = attempt(folder)
        assert isinstance(found, str) or found.where.startswith(str(folder))
        (folder / name).write_bytes(clean[name])
