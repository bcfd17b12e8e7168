"""`ckptconv inspect` of distributed checkpoints: chunk grids, what lies where, and what is missing, doubled or left over."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import ckptconv
from ckptconv.testing.workbench import bytes_read
from tests.cli.helpers.console import Console

GOLDEN = Path(__file__).parents[1] / "golden" / "mcore"
TORCH_DIST = GOLDEN / "llama_tp2pp2" / "ckpt"  # Megatron-Core 0.16.1 wrote it at tp 2, pp 2
ZARR = GOLDEN / "zarr_mcore0.12.0_llama_bf16_tp2pp2"
NAME = "iter_0000007"


def storage(console: Console, path: Path, *more: str | Path, code: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(console("inspect", path, "--json", *more, code=code).out)
    return {**told["storage"], "problem": told["problem"]}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the real checkpoint, to damage."""
    return Path(shutil.copytree(TORCH_DIST, tmp_path / "ckpt"))


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    told = FileSystemReader(folder).read_metadata()
    change(told)
    (folder / ".metadata").write_bytes(pickle.dumps(told))


def test_real_checkpoint_in_text(console: Console) -> None:
    lines = [line.strip() for line in console("inspect", TORCH_DIST).out.splitlines()]
    assert "stored as torch_dist: 9 tensors, 53 chunks, 20 objects, 8 files" in lines
    assert "decoder.layers.mlp.linear_fc1.weight  fp32 [4, 192, 64] in 4x4 chunks of [1, 48, 64]" in lines
    assert "decoder.layers.mlp.linear_fc2.weight  fp32 [4, 64, 96] in 4x1x2 chunks of [1, 64, 48]" in lines
    assert "decoder.final_layernorm.weight  fp32 [64] in 1 chunk" in lines
    assert "decoder.layers.mlp.linear_fc1._extra_state  4 objects, 5.04 kB" in lines
    assert "__3_1.distcp  87.29 kB  6 chunks" in lines
    assert not [line for line in lines if line.startswith("unused")]


def test_real_checkpoint_is_told_as_torch_reads_it(console: Console) -> None:
    """Every chunk and object, and which file holds it."""
    told = FileSystemReader(TORCH_DIST / NAME).read_metadata()
    facts = storage(console, TORCH_DIST)
    entries = {k: v for k, v in told.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    assert {row["name"]: (row["shape"], row["chunks"]) for row in facts["tensors"]} == {
        key: (list(entry.size), len(entry.chunks)) for key, entry in entries.items()
    }
    for row in facts["tensors"]:
        assert all(list(chunk.sizes) == row["chunk"] for chunk in entries[row["name"]].chunks)
    for row in facts["files"]:
        held = [index.fqn in entries for index, at in told.storage_data.items() if at.relative_path == row["file"]]
        assert (row["chunks"], row["objects"]) == (sum(held), len(held) - sum(held))
        assert row["bytes"] == (TORCH_DIST / NAME / row["file"]).stat().st_size
    assert sum(row["objects"] for row in facts["objects"]) == len(told.state_dict_metadata) - len(entries)


def test_zarr_is_told_by_array(console: Console) -> None:
    facts = storage(console, ZARR / "ckpt", "--loader.config", ZARR / "hf", "--vocab-size", "160")
    assert facts["backend"] == "zarr"
    for row in facts["tensors"]:
        header = json.loads((ZARR / "ckpt" / NAME / row["name"] / ".zarray").read_text())
        assert (row["shape"], row["chunk"]) == (header["shape"], header["chunks"])
    sizes = {f"{p.parent.name}/": 0 for p in (ZARR / "ckpt" / NAME).glob("*/.zarray")}
    for path in (ZARR / "ckpt" / NAME).glob("*/[0-9]*"):
        sizes[f"{path.parent.name}/"] += path.stat().st_size
    assert {row["file"]: row["bytes"] for row in facts["files"]} == sizes
    assert facts["unused"] == []
    text = console("inspect", ZARR / "ckpt", "--loader.config", ZARR / "hf", "--vocab-size", "160").out
    assert "stored as zarr: 9 tensors, 53 chunks, 16 objects\n" in text


def test_alike_layers_share_a_line(console: Console, models: Path, tmp_path: Path) -> None:
    ckptconv.convert(models / "mixtral", tmp_path / "out", saver="mcore-dist", saver_options={"layers": "separate"})
    text = console("inspect", tmp_path / "out").out
    assert "decoder.layers.*.mlp.experts.experts.linear_fc1.weight (4)  bf16 [4, " in text
    assert "decoder.layers.*.mlp.experts.experts.linear_fc1._extra_state (4)  16 objects, " in text
    rows = storage(console, tmp_path / "out")["tensors"]
    assert sum(row["name"].endswith(".experts.linear_fc1.weight") for row in rows) == 4


def test_long_lists_are_cut_in_text_alone(console: Console, models: Path, tmp_path: Path) -> None:
    ckptconv.convert(models / "llama", tmp_path / "out", saver="mcore-dist")
    (folder,) = (tmp_path / "out").glob("iter_*")
    for number in range(250):
        (folder / f"stray{number:03d}").touch()
    assert "  and 50 more (--json lists all)\n" in console("inspect", tmp_path / "out").out
    assert len(storage(console, tmp_path / "out")["unused"]) == 250


def test_only_metadata_and_headers_are_read(console: Console, models: Path, tmp_path: Path) -> None:
    ckptconv.convert(models / "llama", tmp_path / "out", saver="mcore-dist", saver_options={"chunk": "whole"})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.distcp"))
    before = bytes_read()
    storage(console, tmp_path / "out")
    assert bytes_read() - before < size


def test_what_is_left_over_is_unused(console: Console, broken: Path) -> None:
    with (broken / NAME / "__0_0.distcp").open("ab") as file:
        end = file.tell()
        file.write(b"tail")
    (broken / NAME / "__7_0.distcp").write_bytes(b"of a save that was broken off")
    (broken / NAME / "notes").write_text("mine")
    facts = storage(console, broken)
    assert facts["unused"] == [
        {"file": "__0_0.distcp", "start": end, "bytes": 4},
        {"file": "__7_0.distcp", "start": 0, "bytes": 29},
        {"file": "notes", "start": 0, "bytes": 4},
    ]
    text = console("inspect", broken).out
    assert f"unused: __0_0.distcp  4 B at byte {end}\n" in text
    assert "unused: __7_0.distcp  29 B\n" in text


def test_missing_files_fail_after_all_else_is_said(console: Console, broken: Path) -> None:
    for name in ("__1_0.distcp", "__2_1.distcp"):
        (broken / NAME / name).unlink()
    ran = console("inspect", broken, code=1)
    assert "format: mcore-dist\n" in ran.out
    assert "__1_0.distcp  is missing  5 chunks, 1 object\n" in ran.out
    assert "decoder.layers.mlp.linear_fc1.weight  fp32 [4, 192, 64] in 4x4 chunks" in ran.out
    for name in ("__1_0.distcp", "__2_1.distcp"):
        assert f"{name}: is missing" in ran.err
    assert len(storage(console, broken, code=1)["problems"]) == 2


def test_missing_and_doubled_chunks_are_all_listed(console: Console, broken: Path) -> None:
    def damage(told: Metadata) -> None:
        tensors: Any = told.state_dict_metadata
        fc1, fc2 = (tensors[f"decoder.layers.mlp.linear_{n}.weight"].chunks for n in ("fc1", "fc2"))
        fc1.append(fc1[0])
        fc2.pop()

    edit(broken / NAME, damage)
    facts = storage(console, broken, code=1)
    text = " ".join(facts["problems"])
    assert "decoder.layers.mlp.linear_fc1.weight: two chunks are at offset [" in text
    assert "decoder.layers.mlp.linear_fc2.weight: has bytes at offset [" in text
    assert all(problem in facts["problem"] for problem in facts["problems"])
    assert len(facts["tensors"]) == 7
    assert len(facts["files"]) == 8


def test_odd_boxes_are_told(console: Console, broken: Path) -> None:
    """As if a fully parallel save had cut the embedding elsewhere."""

    def damage(told: Metadata) -> None:
        rows: Any = told.state_dict_metadata["embedding.word_embeddings.weight"]
        first, second = rows.chunks
        first.sizes, second.offsets, second.sizes = torch.Size((100, 64)), torch.Size((100, 0)), torch.Size((156, 64))
        moved = next(i for i in told.storage_data if i.fqn == "embedding.word_embeddings.weight" and i.offset[0])
        place = told.storage_data.pop(moved)
        told.storage_data[type(moved)(moved.fqn, torch.Size((100, 0)))] = place

    edit(broken / NAME, damage)
    ran = console("inspect", broken, code=1)
    assert "embedding.word_embeddings.weight  fp32 [256, 64] in 2 boxes: axis 0 is cut in 100, 156\n" in ran.out
    assert ran.err.count("embedding.word_embeddings.weight") == 2, "the blobs are of another shape"


def test_missing_zarr_chunks_are_told(console: Console, tmp_path: Path) -> None:
    shutil.copytree(ZARR / "ckpt", tmp_path / "ckpt")
    for name in ("0.1.0", "3.3.0"):
        (tmp_path / "ckpt" / NAME / "decoder.layers.mlp.linear_fc1.weight" / name).unlink()
    arguments = (tmp_path / "ckpt", "--loader.config", ZARR / "hf", "--vocab-size", "160")
    ran = console("inspect", *arguments, code=1)
    assert "[4, 192, 64] in 4x4 chunks of [1, 48, 64], of which 2 are not there\n" in ran.out
    assert "0.1.0, 3.3.0" in ran.err
    rows = storage(console, *arguments, code=1)["tensors"]
    assert [row["missing"] for row in rows if "missing" in row] == [2]


def test_every_damaged_zarr_file_is_listed(console: Console, tmp_path: Path) -> None:
    shutil.copytree(ZARR / "ckpt", tmp_path / "ckpt")
    folder = tmp_path / "ckpt" / NAME / "decoder.layers.mlp.linear_fc1.weight"
    for path in folder.glob("[0-9]*"):
        path.write_bytes(b"short")
    told = storage(console, tmp_path / "ckpt", code=1)
    assert len(told["problems"]) == 16
    assert all(problem in told["problem"] for problem in told["problems"])


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_unreadable_metadata_leaves_the_list_of_files(console: Console, broken: Path, name: str) -> None:
    (broken / NAME / name).write_bytes(b"{garbage")
    ran = console("inspect", broken, code=1)
    assert f"{NAME}/__0_0.distcp  114.10 kB" in ran.out
    assert name in ran.err
