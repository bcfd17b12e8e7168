"""Damaged, lying and hostile torch distributed checkpoints: one error that lists what is wrong, and nothing is run."""

from __future__ import annotations

import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptconv.assemble import Box
from ckptconv.containers import dcp
from tests.hostile.damage_dcp import W0, W2, Evil, made, refused


def index(key: str, *offset: int) -> MetadataIndex:
    return MetadataIndex(key, offset or None)


def chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(lo for lo, _ in box), torch.Size(hi - lo for lo, hi in box))


def cut(*boxes: Box) -> Callable[[Any], object]:
    """The metadata says that `w` is cut so."""

    def edit(m: Any) -> None:
        m.state_dict_metadata["w"].chunks = [chunk(box) for box in boxes]
        place = m.storage_data[index("w", 0, 0)]
        for i, box in enumerate(boxes):
            at = index("w", *(lo for lo, _ in box))
            m.storage_data[at] = _StorageInfo(place.relative_path, place.offset + i, 1)

    return edit


def place(key: MetadataIndex, **values: object) -> Callable[[Any], object]:
    return lambda m: vars(m.storage_data[key]).update(values)


def says(key: str, **values: object) -> Callable[[Any], object]:
    return lambda m: vars(m.state_dict_metadata[key]).update(values)


def spelled(key: str, dtype: object) -> Callable[[Any], object]:
    return lambda m: setattr(m.state_dict_metadata[key].properties, "dtype", dtype)


LIES: dict[str, tuple[Callable[[Any], object], tuple[str, ...]]] = {
    "overlap": (cut(((0, 3), (0, 3)), ((2, 4), (0, 3))), ("w: the chunks [0:3, 0:3] and [2:4, 0:3] overlap",)),
    "hole": (cut(((0, 1), (0, 3)), ((2, 4), (0, 3))), ("w: of [0:2, 0:3] only [0:1, 0:3] is there",)),
    "hole-at-the-start": (cut(((2, 4), (0, 3))), ("w: of [0:4, 0:3] only [2:4, 0:3]",)),
    "overlap-and-hole": (cut(((0, 2), (0, 3)), ((1, 3), (0, 3))), ("w: the chunks",)),
    "pinwheel-with-a-hole": (cut(((0, 1), (0, 2)), ((0, 3), (2, 3)), ((3, 4), (1, 3)), ((1, 4), (0, 1))), ("w: ", "hole")),
    "outside": (cut(((0, 2), (0, 3)), ((2, 5), (0, 3))), ("w: the chunk [2:5, 0:3] lies outside shape (4, 3)",)),
    "before": (says("b", chunks=[chunk(((-1, 2),))]), ("b: the chunk [-1:2] lies outside",)),
    "twice": (cut(((0, 2), (0, 3)), ((0, 2), (0, 3))), ("w: two chunks are at offset [0, 0]",)),
    "no-chunks": (says("w", chunks=[]), ("w: nothing covers [0:4, 0:3]", "w: has bytes at offset [2, 0]")),
    "axes": (says("w", size=torch.Size([4, 3, 1])), ("w: of 3 axes, has a chunk at (0, 0)",)),
    "shape-huge": (says("w", size=torch.Size([1 << 61, 1 << 61])), ("w: has shape", "overflows")),
    "shape-negative": (says("w", size=(-4, 3)), ("w: has shape (-4, 3)",)),
    "shape-text": (says("w", size="43"), ("w: has shape '43'",)),
    "shape-float": (says("w", size=(4.0, 3)), ("w: has shape (4.0, 3)",)),
    "shape-bool": (says("w", size=(True, 3)), ("w: has shape (True, 3)",)),
    "chunks-text": (says("w", chunks="xx"), ("w: has chunks 'xx'",)),
    "chunk-text": (says("w", chunks=["x"]), ("w: of 2 axes, has a chunk at None",)),
    "properties-none": (says("w", properties=None), ("w: has dtype None",)),
    "dtype-complex": (spelled("w", torch.complex64), ("w: is of type torch.complex64, which is not supported",)),
    "entry-text": (lambda m: m.state_dict_metadata.update(w="x"), ("w: is neither a tensor nor bytes, but 'x'",)),
    "key-number": (lambda m: m.state_dict_metadata.update({7: BytesStorageMetadata()}), ("the key 7 is not text of",)),
    "not-stored": (lambda m: m.storage_data.pop(W2), ("w: has no bytes for its chunk at offset [2, 0]",)),
    "object-not-stored": (lambda m: m.storage_data.pop(index("o")), ("o: is an object, yet stored nowhere",)),
    "not-described": (lambda m: m.state_dict_metadata.pop("b"), ("b: has bytes stored, but is not described",)),
    "object-as-chunk": (
        lambda m: m.storage_data.update({index("o", 0): m.storage_data.pop(index("o"))}), ("o: is an object, yet stored",)
    ),
    "tensor-as-object": (
        lambda m: m.storage_data.update({index("b"): m.storage_data.pop(index("b", 0))}), ("b: has bytes at offset none",)
    ),
    "index-text": (lambda m: m.storage_data.update(x=m.storage_data.pop(W2)), ("not named by a key", "no bytes for")),
    "place-text": (lambda m: m.storage_data.update({W2: "x"}), ("w [2, 0]: lies in None",)),
    "past-the-end": (place(W2, length=1 << 40), ("w: lies at", "which has", "truncated?")),
    "far-away": (place(W2, offset=1 << 60), ("w: lies at",)),
    "negative-offset": (place(W2, offset=-5), ("w: lies at -5..",)),
    "negative-length": (place(W2, length=-1), ("w: lies at",)),
    "no-bytes": (place(index("o"), length=0), ("o: lies at 0..0",)),
    "offset-float": (place(W2, offset=0.0), ("w [2, 0]: lies at 0.0+",)),
    "shared-bytes": (lambda m: m.storage_data.update({W2: m.storage_data[W0]}), ("w and w: share bytes",)),
    "transformed": (place(W2, transform_descriptors=["ZStandard"]), ("w [2, 0]: is stored transformed", "ZStandard")),
    "flattened-from-text": (
        lambda m: setattr(m, "mcore_data", {"w": {"nd_reformulated_orig_global_shape": "x"}}), ("was flattened from",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lying_metadata_is_refused_by_key(tmp_path: Path, name: str) -> None:
    edit, parts = LIES[name]
    folder = made(tmp_path, edit)
    with refused(folder, *parts):
        dcp.read(folder)


NAMES = ["../x.distcp", "/etc/passwd", "a/b.distcp", "..", ".", "", "\\x", "C:x", "a\0b", "a\nb", ".metadata", 7, None]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_file_outside_the_folder_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / "x.distcp").write_bytes(bytes(10_000))
    (tmp_path / "in" / "a").mkdir(parents=True)
    folder = made(tmp_path / "in", place(W2, relative_path=name))
    with refused(folder, "w [2, 0]: lies in", "not the name of a file in this folder"):
        dcp.read(folder)


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    def edit(m: Any) -> None:
        LIES["hole"][0](m)
        LIES["dtype-complex"][0](m)
        LIES["object-not-stored"][0](m)
        m.storage_data[index("b", 0)].relative_path = "__7_7.distcp"

    folder = made(tmp_path, edit)
    with refused(
        folder, "w: of [0:2", "complex64", "o: is an object", "__7_7.distcp: is missing", "b", match=r"\d things"
    ):
        dcp.read(folder)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_missing_file_is_named_with_what_lies_in_it(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path, files=2)
    path = folder / "__1_0.distcp"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with refused(folder, "__1_0.distcp: is missing or not a regular file; 2 chunks lie in it, such as w, b"):
        dcp.read(folder)


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, lambda p: p.write_bytes(b""), os.mkfifo])
def test_folder_without_metadata_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / ".metadata")
    with refused(tmp_path, ".metadata"):
        dcp.read(tmp_path)


@pytest.mark.parametrize("cut_at", range(0, 100, 4))
def test_truncated_metadata_is_refused(tmp_path: Path, cut_at: int) -> None:
    path = made(tmp_path) / ".metadata"
    os.truncate(path, path.stat().st_size * cut_at // 100)
    with refused(path):
        dcp.read(tmp_path)


@pytest.mark.parametrize("cut_at", range(0, 100, 10))
def test_truncated_data_is_refused(tmp_path: Path, cut_at: int) -> None:
    path = made(tmp_path) / "__0_0.distcp"
    os.truncate(path, path.stat().st_size * cut_at // 100)
    with refused(tmp_path, "__0_0.distcp", "truncated?"):
        dcp.read(tmp_path)


@pytest.mark.parametrize(
    "root", [None, [], {}, {"state_dict_metadata": {}, "storage_data": {}}, "Metadata", torch.Size([1])], ids=repr
)
def test_pickle_of_something_else_is_refused(tmp_path: Path, root: object) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(root))
    with refused(path, "not the metadata"):
        dcp.read(tmp_path)


HOSTILE: dict[str, Callable[[Any, object], object]] = {
    "planner_data": lambda m, evil: setattr(m, "planner_data", evil),
    "storage_meta": lambda m, evil: setattr(m, "storage_meta", evil),
    "plans": lambda m, evil: setattr(m, "all_local_plans", [evil]),
    "key": lambda m, evil: m.state_dict_metadata.update({evil: 1}),
    "dtype": lambda m, evil: spelled("w", evil)(m),
    "place": lambda m, evil: m.storage_data.update({W2: evil}),
    "unknown-field": lambda m, evil: setattr(m, "more", evil),
}


@pytest.mark.parametrize("where", HOSTILE)
def test_hostile_class_in_the_metadata_runs_nothing(tmp_path: Path, where: str) -> None:
    mark = tmp_path / "executed"
    folder = made(tmp_path / "x", lambda m: HOSTILE[where](m, Evil(os.system, f"touch {mark}")))
    with refused(folder, ".metadata", "system", "Do not trust this file"):
        dcp.read(folder)
    assert not mark.exists()


def test_unknown_class_stays_inert(tmp_path: Path) -> None:
    """Where it does not matter; a planner may leave anything."""
    folder = made(tmp_path, lambda m: setattr(m, "planner_data", Evil(random.Random, 5)), protocol=2)
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"crandom\nRandom\n", b"csome.where\nThing\n"))
    assert b"some.where" in path.read_bytes()
    assert dcp.read(folder).objects.keys() == {"o"}


def test_unknown_class_where_a_tensor_should_be_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, protocol=2) / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"\nTensorStorageMetadata\n", b"\nStrangeStorageMetadata\n"))
    with refused(path, "w: is neither a tensor nor bytes", "StrangeStorageMetadata"):
        dcp.read(tmp_path)


def test_deep_nesting_in_a_known_class_is_harmless(tmp_path: Path) -> None:
    """The limits on a pickle's object stop before known classes; a file name a hundred thousand lists deep is no text."""
    path = made(tmp_path, protocol=2) / ".metadata"
    data, name = path.read_bytes(), b"X\x0c\0\0\0__0_0.distcp"
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, b"]" * 100_000 + b"a" * 99_999))
    with refused(path, "w [2, 0]: lies in [[[["):
        dcp.read(tmp_path)


# -- size -------------------------------------------------------------------------------------------------------------


def test_nested_cuts_have_a_bound(tmp_path: Path) -> None:
    """A spiral that takes one box off at a time is no grid that anybody writes; it must not cost time or stack."""
    box: list[tuple[int, int]] = [(0, 1000), (0, 1000)]
    boxes: list[Box] = []
    for i in range(1500):
        axis = i % 2
        lo, hi = box[axis]
        piece = list(box)
        piece[axis] = (lo, lo + 1)
        boxes.append(tuple(piece))
        box[axis] = (lo + 1, hi)
    boxes.append(tuple(box))

    def edit(m: Any) -> None:
        cut(*boxes)(m)
        m.state_dict_metadata["w"].size = torch.Size([1000, 1000])

    folder = made(tmp_path, edit)
    with refused(folder, "w: "):
        dcp.read(folder)


def test_chunks_shared_by_many_tensors_are_a_bomb(tmp_path: Path) -> None:
    def edit(m: Any) -> None:
        w = m.state_dict_metadata["w"]
        w.chunks *= 5_000
        m.state_dict_metadata.update({f"k{i}": w for i in range(5_000)})

    folder = made(tmp_path, edit)
    with refused(folder, ".metadata", "over and over (a bomb)"):
        dcp.read(folder)


def test_very_long_keys_are_refused(tmp_path: Path) -> None:
    long = "k" * 1_000_000

    def edit(m: Any) -> None:
        m.state_dict_metadata[long] = m.state_dict_metadata["w"]
        m.storage_data.update({index(long, i): m.storage_data[W0] for i in range(10_000)})

    folder = made(tmp_path, edit)
    with refused(folder, "'kkkkkkkkkkkk...kkkkkkkkkkkkk' is not text of at most 1024 characters"):
        dcp.read(folder)


def test_very_many_lies_are_counted(tmp_path: Path) -> None:
    def edit(m: Any) -> None:
        for i in range(20_000):
            m.state_dict_metadata[f"k{i}"] = TensorStorageMetadata(TensorProperties(), torch.Size([2]), [])

    folder = made(tmp_path, edit)
    with refused(folder, "k0: nothing covers", "and 19000 more", match=re.escape("20000 things are wrong")):
        dcp.read(folder)
