"""Distributed checkpoints through every other form and back: every stop is the same model, and the same options give the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

import ckptconv
from ckptconv.assemble import Box
from ckptconv.containers.dcp import read
from ckptconv.testing.checkpoints import write_hf
from tests.roundtrip.plain_slices import Tensors, read_safetensors
from tests.unit.helpers import dcp

QUICK = ckptconv.ExecuteOptions(durable=False)
SEPARATE, STACKED = {"layers": "separate"}, {"layers": "stacked"}
ZARR = {"backend": "zarr", "mcore_version": "0.12"}
Step = tuple[str, dict[str, Any], dict[str, Any]]  # saver, its options, layout


def dist(**options: Any) -> Step:
    return "mcore-dist", options, {}


RANKS: Step = ("mcore", {}, {"tp": 2, "pp": 2})
CHAINS: dict[str, tuple[str, list[Step]]] = {
    "dense": (
        "llama-bias",
        [
            dist(**STACKED, files=3), dist(**SEPARATE), dist(**ZARR), RANKS, dist(**ZARR, chunk="whole"),
            ("hf", {}, {}), dist(chunk="whole", files=2), ("legacy", {}, {"tp": 2, "pp": 2}), dist(), ("hf", {}, {}),
        ],
    ),
    "tied": (
        "llama-tied",
        [dist(), ("legacy", {}, {"tp": 4}), dist(**SEPARATE), dist(**ZARR), RANKS, dist(**STACKED), ("hf", {}, {})],
    ),
    "experts": (
        "mixtral",
        [
            dist(**STACKED), dist(**SEPARATE, files=3), dist(**ZARR), dist(**ZARR, **SEPARATE), dist(chunk="whole"),
            ("mcore", {"experts": "sequential"}, {"tp": 2, "pp": 2, "ep": 2}), dist(),
            ("mcore", {"experts": "grouped"}, {"ep": 4}), dist(**SEPARATE), ("hf", {}, {}),
        ],
    ),
}  # fmt: skip


def step(source: Path, target: Path, to: Step) -> Path:
    saver, options, layout = to
    ckptconv.convert(source, target, saver=saver, saver_options=options, execute_options=QUICK, **layout)
    return target


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which tells where a tensor came from."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "ckptconv.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def iteration(folder: Path) -> Path:
    (found,) = folder.glob("iter_*")
    return found


def check_bits(found: Tensors, wanted: Tensors) -> None:
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", CHAINS)
def test_every_stop_of_a_chain_is_the_same_model(name: str, tmp_path: Path) -> None:
    model, steps = CHAINS[name]
    start = write_hf(tmp_path / "start", model)
    folder = start
    for number, to in enumerate(steps):
        folder = step(folder, tmp_path / f"{number}-{to[0]}", to)
        verdict = ckptconv.verify(start, folder)
        assert verdict.differences == (), folder.name
        assert verdict.tensors > 20
        if to[0] == "mcore-dist":
            told = json.loads((iteration(folder) / "metadata.json").read_text())
            assert told["sharded_backend"] == to[1].get("backend", "torch_dist")
    check_bits(read_safetensors(folder), read_safetensors(start))


@pytest.mark.parametrize("model", ["llama", "llama-tied", "qwen3", "mixtral"])
@pytest.mark.parametrize("options", [STACKED, SEPARATE, {"files": 3}, {"chunk": "whole"}], ids=str)
def test_there_and_back_gives_the_same_tensors_and_the_same_bytes(
    model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """The tensors as torch reads them; bytes because nothing tells where, when or by which way they were written."""
    first = step(write_hf(tmp_path / "hf", model), tmp_path / "first", dist(**options))
    ranks = step(first, tmp_path / "ranks", ("mcore", {}, {"tp": 2, "pp": 2}))
    again = step(ranks, tmp_path / "again", dist(**options))
    check_bits(dcp.load(iteration(again)), dcp.load(iteration(first)))
    assert content(again).keys() == content(first).keys()
    assert [name for name, data in content(first).items() if content(again)[name] != data] == []


def test_zarr_there_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    first = step(write_hf(tmp_path / "hf", "mixtral"), tmp_path / "first", dist(**ZARR))
    ranks = step(first, tmp_path / "ranks", RANKS)
    assert content(step(ranks, tmp_path / "again", dist(**ZARR))) == content(first)


def test_number_of_files_and_chunks_is_of_no_consequence(tmp_path: Path) -> None:
    """torch reads the same tensors, and from all of them the same bytes are made."""
    source = write_hf(tmp_path / "hf", "mixtral")
    wanted: dict[str, dict[str, Any]] = {
        "one": {"files": 1}, "three": {"files": 3}, "whole": {"chunk": "whole", "files": 2}
    }  # fmt: skip
    made = {name: step(source, tmp_path / name, dist(**options)) for name, options in wanted.items()}
    chunks = {}
    for name, folder in made.items():
        found = read(iteration(folder)).tensors
        chunks[name] = len(found["decoder.layers.mlp.experts.experts.linear_fc2.weight"].chunks)
        check_bits(dcp.load(iteration(folder)), dcp.load(iteration(made["one"])))
    assert chunks == {"one": 16, "three": 16, "whole": 1}
    counts = {name: len(list(iteration(folder).glob("*.distcp"))) for name, folder in made.items()}
    assert counts == {"one": 1, "three": 3, "whole": 2}
    ranks = [content(step(folder, tmp_path / f"{name} ranks", RANKS)) for name, folder in made.items()]
    assert ranks[0] == ranks[1] == ranks[2]


class Cut(torch.Tensor):
    """A tensor in boxes, for torch's own saver: it asks for the items to write, then for the part that each is of."""

    boxes: Sequence[Box]

    @staticmethod
    def of(tensor: torch.Tensor, boxes: Sequence[Box]) -> Cut:
        made = tensor.as_subclass(Cut)
        made.boxes = boxes
        return made

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        told = TensorProperties(self.dtype)
        items = ((MetadataIndex(fqn, c.offsets), TensorWriteData(c, told, self.size())) for c in self._chunks())
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data) for index, data in items]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        box = next(box for box in self.boxes if tuple(lo for lo, _ in box) == tuple(index.offset or ()))
        return self.as_subclass(torch.Tensor)[tuple(slice(lo, hi) for lo, hi in box)].contiguous()

    def _chunks(self) -> list[ChunkStorageMetadata]:
        sizes = [(torch.Size(lo for lo, _ in box), torch.Size(hi - lo for lo, hi in box)) for box in self.boxes]
        return [ChunkStorageMetadata(*size) for size in sizes]


def saved_by_torch(state: dict[str, Any], folder: Path, threads: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        save(state, storage_writer=FileSystemWriter(folder, thread_count=threads), no_dist=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model", ["llama-bias", "mixtral"])
def test_any_chunks_that_torch_saves_are_read(model: str, seed: int, tmp_path: Path) -> None:
    """Every tensor cut in boxes at random: across layers, experts, gate and up, heads."""
    rng = random.Random(seed)
    source = write_hf(tmp_path / "hf", model)
    options = {"layers": rng.choice(["stacked", "separate"])}
    whole = iteration(step(source, tmp_path / "whole", dist(**options)))
    odd = tmp_path / "odd" / whole.name
    cuts = {
        key: (tensor, dcp.grid(rng, tensor.shape, rng.choice([0, 1, 3, 20]))) for key, tensor in dcp.load(whole).items()
    }
    saved_by_torch({key: Cut.of(*cut) for key, cut in cuts.items()}, odd, rng.choice([1, 3]))
    for name in ("common.pt", "metadata.json"):
        shutil.copy(whole / name, odd)
    found = read(odd).tensors
    assert {key: len(entry.chunks) for key, entry in found.items()} == {k: len(boxes) for k, (_, boxes) in cuts.items()}
    assert sum(len(entry.chunks) for entry in found.values()) > len(found) + 10
    wishes: dict[str, Any] = {"loader_options": {"config": source}, "execute_options": QUICK}
    ckptconv.convert(odd.parent, tmp_path / "back", saver="hf", **wishes)
    check_bits(read_safetensors(tmp_path / "back"), read_safetensors(source))
    ckptconv.convert(odd.parent, tmp_path / "ranks", saver="mcore", tp=2, pp=2, **wishes)
    assert ckptconv.verify(tmp_path / "ranks", source).differences == ()
