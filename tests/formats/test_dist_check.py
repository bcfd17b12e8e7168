"""`--check` on files that Megatron-Core and NeMo wrote: a flipped bit of a tensor is found; without it, it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.containers import dcp
from ckptconv.errors import CkptconvError
from tests.unit.helpers.nemo import PER_RANK, nemo

LLAMA = Path(__file__).parent.parent / "golden/mcore/llama_tp2pp2"


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def loaded(path: Path, **wishes: Any) -> None:
    ckptconv.load(path, **wishes)


def test_a_flipped_bit_of_a_chunk_is_found_by_its_checksum(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(LLAMA / "ckpt", folder)
    wishes = {"loader_options": {"config": LLAMA / "hf"}}
    loaded(folder, check=True, **wishes)
    (iteration,) = folder.glob("iter_*")
    chunk = dcp.read(iteration).tensors["decoder.layers.mlp.linear_fc1.weight"].chunks[0].item
    flip(Path(chunk.path), chunk.offset + chunk.nbytes // 2)
    loaded(folder, **wishes)
    with pytest.raises(CkptconvError, match="CRC32"):
        loaded(folder, check=True, **wishes)


def test_a_flipped_bit_of_a_member_of_an_archive_is_found_by_its_checksum(tmp_path: Path) -> None:
    archive = nemo(PER_RANK, tmp_path)
    loaded(archive, check=True)
    flip(archive, archive.stat().st_size // 2)
    loaded(archive)
    with pytest.raises(CkptconvError, match="CRC32"):
        loaded(archive, check=True)


def test_bytes_that_the_metadata_does_not_speak_of_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(LLAMA / "ckpt", folder)
    file = min(folder.glob("iter_*/*.distcp"))
    file.write_bytes(file.read_bytes() + bytes(100))
    notes = ckptconv.load(folder, loader_options={"config": LLAMA / "hf"}).extras.notes
    assert f"100 bytes of {file.name}" in " ".join(notes)
