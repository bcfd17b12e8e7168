"""Kinds of damage to distributed checkpoints (torch_dist): files gone, cut or mixed, metadata that lies, all at once."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError
from tests.hostile.damage import (
    ITERATION,
    Act,
    Case,
    Row,
    append,
    cases,
    copied,
    cut,
    from_other,
    instead,
    link,
    link_out,
    moved,
    remove,
    shorten,
    text,
)
from tests.hostile.damage_bits import flips, whole
from tests.hostile.damage_pickle import BOMBS, BROKEN

METADATA, COMMON, TELLING = (f"{ITERATION}/{name}" for name in (".metadata", "common.pt", "metadata.json"))
FILES = [f"{ITERATION}/__0_{n}.distcp" for n in (0, 1)]
FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
QKV, NORM = "decoder.layers.self_attention.linear_qkv.weight", "decoder.final_layernorm.weight"
EXTRA = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_4"
Change = Callable[[Any], object]
ANY = (FormatError, ConfigError, CoverageError)


# -- edits of the metadata and of blobs ------------------------------------------------------------------------------


def edit_metadata(change: Change) -> Act:
    """Loaded by torch's classes, changed, and pickled again."""

    def act(folder: Path) -> None:
        metadata = pickle.loads((folder / METADATA).read_bytes())
        change(metadata)
        (folder / METADATA).write_bytes(pickle.dumps(metadata, protocol=4))

    return act


def every(*acts: Act) -> Act:
    def act(folder: Path) -> None:
        for one in acts:
            one(folder)

    return act


def both(*changes: Change) -> Change:
    return lambda m: [change(m) for change in changes]


def at(key: str, *offset: int) -> MetadataIndex:
    return MetadataIndex(key, torch.Size(offset) if offset else None)


def place(index: MetadataIndex, **values: object) -> Change:
    return lambda m: vars(m.storage_data[index]).update(values)


def says(key: str, **values: object) -> Change:
    return lambda m: vars(m.state_dict_metadata[key]).update(values)


def chunks(key: str, change: Callable[[list[Any]], object]) -> Change:
    return lambda m: change(m.state_dict_metadata[key].chunks)


def put_chunk(key: str, n: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Change:
    """The n-th chunk is said to be another box, and its bytes to be there."""

    def change(m: Any) -> None:
        held = m.state_dict_metadata[key].chunks
        m.storage_data[at(key, *offsets)] = m.storage_data.pop(at(key, *held[n].offsets))
        held[n] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    return change


def swap(one: MetadataIndex, two: MetadataIndex) -> Change:
    def change(m: Any) -> None:
        m.storage_data[one], m.storage_data[two] = m.storage_data[two], m.storage_data[one]

    return change


def renamed(key: str, to: str) -> Change:
    """Everywhere, so that the metadata does not contradict itself."""

    def change(m: Any) -> None:
        m.state_dict_metadata[to] = m.state_dict_metadata.pop(key)
        for index in [i for i in m.storage_data if i.fqn == key]:
            m.storage_data[MetadataIndex(to, index.offset)] = m.storage_data.pop(index)

    return change


def forgotten(key: str) -> Change:
    def change(m: Any) -> None:
        del m.state_dict_metadata[key]
        for index in [i for i in m.storage_data if i.fqn == key]:
            del m.storage_data[index]

    return change


def fewer_layers(m: Any) -> None:
    """One less in every stacked tensor, and nothing else amiss."""
    for key, told in m.state_dict_metadata.items():
        if ".layers." in key and not isinstance(told, BytesStorageMetadata):
            told.size = torch.Size((3, *told.size[1:]))
            told.chunks = [c for c in told.chunks if c.offsets[0] < 3]
    for index in [i for i in m.storage_data if ".layers." in i.fqn and i.offset is not None and i.offset[0] == 3]:
        del m.storage_data[index]


def blob_of(content: bytes, index: MetadataIndex) -> Act:
    """Other bytes stand for a chunk or an object, in a file of their own."""

    def act(folder: Path) -> None:
        (folder / ITERATION / "__9_9.distcp").write_bytes(content)
        edit_metadata(lambda m: m.storage_data.update({index: _StorageInfo("__9_9.distcp", 0, len(content))}))(folder)

    return act


def _rewritten(change: Callable[[bytes], bytes]) -> Act:
    return lambda folder: (folder / METADATA).write_bytes(change((folder / METADATA).read_bytes()))


# -- files -----------------------------------------------------------------------------------------------------------

_MISSING: dict[str, Row] = {
    "the first": (remove(FILES[0]), METADATA, "__0_0.distcp: is missing"),
    "the last": (remove(FILES[1]), METADATA, "__0_1.distcp: is missing"),
    "both": (remove(*FILES), "__0_0.distcp: is missing", "__0_1.distcp: is missing"),
    "renamed": (moved(FILES[1], f"{ITERATION}/__1_0.distcp"), "__0_1.distcp: is missing"),
    "a folder": (instead(FILES[1], Path.mkdir), "__0_1.distcp: is missing or not a regular file"),
    "a pipe": (instead(FILES[1], os.mkfifo), "__0_1.distcp: is missing or not a regular file"),
    "a link to nothing": (link(FILES[1], "gone"), "__0_1.distcp: is missing"),
    "a link to itself": (link(FILES[1], "__0_1.distcp"), "__0_1.distcp: is missing"),
    "a device": (link(FILES[1], "/dev/zero"), "__0_1.distcp: is missing or not a regular file"),
    "a link to another file": (link(FILES[1], "/etc/passwd"), "__0_1.distcp"),
}
_CUT: dict[str, Row] = {
    f"{n}, {part:.0%}": (cut(name, part), f"__0_{n}.distcp, which has", "truncated?")
    for n, name in enumerate(FILES)
    for part in (0, 0.3, 0.999)
}
_CUT["the last byte"] = (shorten(FILES[1], 1), "__0_1.distcp, which has", "truncated?")
_OTHERS: dict[str, Row] = {
    "swapped": (every(moved(FILES[0], "x"), moved(FILES[1], FILES[0]), moved("x", FILES[1])), ".distcp"),
    "copied": (copied(FILES[0], FILES[1]), "__0_1.distcp"),
}
_MORE: dict[str, Row] = {
    "bytes behind": (append(FILES[0], bytes(99)), ""),
    "a file": (copied(FILES[0], f"{ITERATION}/__5_0.distcp"), ""),
}
_LINKED: dict[str, Row] = {name: (link_out(name), name) for name in (*FILES, METADATA, COMMON, TELLING)}
FILE_CASES = [
    *cases("distcp missing", "dist", _MISSING),
    *cases("distcp cut", "dist", _CUT),
    *cases("distcp is another one", "dist", _OTHERS),
    *cases("distcp of a wider model", "dist", {n: (from_other(n), ".distcp") for n in FILES}, other="dist wide"),
    *cases(
        "distcp of its twin, --check",
        "dist",
        {n: (from_other(n), n) for n in FILES},
        CkptconvError,
        other="dist other",
        wishes={"check": True},
    ),
    *cases("link out, to the very file", "dist", _LINKED, harmless=True),
    *cases("more than is spoken of", "dist", _MORE, harmless=True),
]

# -- metadata --------------------------------------------------------------------------------------------------------

W0, W1 = at(FC1, 0, 0, 0), at(FC1, 1, 0, 0)
_LIES: dict[str, tuple[Change, *tuple[str, ...]]] = {
    "a chunk not described": (chunks(FC1, lambda c: c.pop(2)), f"{FC1}: of ", "no chunk is described"),
    "a chunk described twice": (chunks(FC1, lambda c: c.append(c[0])), f"{FC1}: two chunks are at offset [0, 0, 0]"),
    "no chunks": (says(FC1, chunks=[]), f"{FC1}: nothing covers"),
    "overlapping": (put_chunk(FC1, 1, (0, 1, 0), (1, 96, 32)), f"{FC1}: "),
    "outside": (put_chunk(FC1, 3, (4, 0, 0), (1, 96, 32)), f"{FC1}: the chunk [4:5,", "outside"),
    "before": (put_chunk(FC1, 0, (-1, 0, 0), (2, 96, 32)), f"{FC1}: the chunk [-1:1,", "outside"),
    "half a chunk": (put_chunk(FC1, 1, (1, 0, 0), (1, 48, 32)), f"{FC1}: "),
    "more axes": (says(FC1, size=torch.Size([4, 96, 32, 1])), FC1, "4 axes"),
    "fewer rows": (says(FC1, size=torch.Size([4, 95, 32])), f"{FC1}: the chunk", "outside"),
    "more rows": (says(FC1, size=torch.Size([4, 97, 32])), FC1),
    "more layers": (says(FC1, size=torch.Size([5, 96, 32])), f"{FC1}: of [3:5, 0:96, 0:32] only"),
    "huge shape": (says(FC1, size=torch.Size([1 << 61, 1 << 61, 9])), f"{FC1}: has shape", "overflows"),
    "endless layers": (says(FC1, size=torch.Size([1 << 40, 96, 32])), FC1),
    "negative shape": (says(FC1, size=(-4, 96, 32)), f"{FC1}: has shape (-4, 96, 32)"),
    "shape of text": (says(FC1, size="large"), f"{FC1}: has shape 'large'"),
    "chunks of text": (says(FC1, chunks="many"), f"{FC1}: has chunks 'many'"),
    "no such dtype": (lambda m: setattr(m.state_dict_metadata[FC1].properties, "dtype", "bf16"), f"{FC1}: has dtype"),
    "complex": (lambda m: setattr(m.state_dict_metadata[FC1].properties, "dtype", torch.complex64), "complex64"),
    "a wider dtype": (lambda m: setattr(m.state_dict_metadata[FC1].properties, "dtype", torch.float32), "says fp32"),
    "the other half float": (
        lambda m: setattr(m.state_dict_metadata[FC1].properties, "dtype", torch.float16),
        "holds bf16",
        "says fp16",
    ),
    "tensor as object": (lambda m: m.state_dict_metadata.update({FC1: BytesStorageMetadata()}), f"{FC1}: is an object"),
    "entry of text": (lambda m: m.state_dict_metadata.update({FC1: "x"}), f"{FC1}: is neither a tensor nor bytes"),
    "a number as key": (lambda m: m.state_dict_metadata.update({7: BytesStorageMetadata()}), "the key 7 is not text"),
    "bytes nowhere": (lambda m: m.storage_data.pop(W1), f"{FC1}: has no bytes for its chunk at offset [1, 0, 0]"),
    "object nowhere": (lambda m: m.storage_data.pop(at(EXTRA)), f"{EXTRA}: is an object, yet stored nowhere"),
    "bytes not described": (lambda m: m.state_dict_metadata.pop(FC1), f"{FC1}: has bytes stored, but is not described"),
    "place of text": (lambda m: m.storage_data.update({W0: "x"}), FC1, "lies in None"),
    "past the end": (place(W0, length=1 << 40), f"{FC1}: lies at", "truncated?"),
    "far away": (place(W0, offset=1 << 60), f"{FC1}: lies at"),
    "negative place": (place(W0, offset=-5), f"{FC1}: lies at -5.."),
    "negative length": (place(W0, length=-1), f"{FC1}: lies at"),
    "length of a float": (place(W0, length=9.5), FC1, "9.5"),
    "one byte off": (lambda m: vars(m.storage_data[W0]).update(offset=m.storage_data[W0].offset + 1), "distcp"),
    "one byte short": (
        lambda m: vars(m.storage_data[W0]).update(length=m.storage_data[W0].length - 1),
        FC1,
        ".distcp!",
    ),
    "the same bytes twice": (lambda m: m.storage_data.update({W0: m.storage_data[W1]}), "share bytes"),
    "stored transformed": (place(W0, transform_descriptors=["ZStandard"]), FC1, "transformed", "ZStandard"),
    "blobs of two shapes swapped": (swap(W0, at(FC2, 0, 0, 0)), "of shape", FC1, FC2),
    "blob and object swapped": (swap(W0, at(EXTRA)), FC1, "not a tensor"),
}
_KEYS: dict[str, tuple[Change, *tuple[str, ...]]] = {
    "missing": (forgotten(FC1), FC1),
    "renamed": (renamed(FC1, FC1 + "s"), FC1),
    "no embedding": (forgotten("embedding.word_embeddings.weight"), "embedding.word_embeddings.weight"),
    "no final norm": (forgotten(NORM), NORM),
    "no output layer": (forgotten("output_layer.weight"), "output_layer.weight"),
    "one more": (renamed(NORM, "decoder.final_layernorm.wait"), "decoder.final_layernorm.wait"),
    "kinds swapped": (both(renamed(FC1, "x"), renamed(FC2, FC1), renamed("x", FC2)), "ffn: ", "the tensors say"),
    "a layer less": (fewer_layers, "layers"),
    "path as key": (renamed(NORM, "../../etc/passwd"), "../../etc/passwd"),
}


def _edited(lies: dict[str, tuple[Change, *tuple[str, ...]]]) -> dict[str, Row]:
    return {name: (edit_metadata(change), *named) for name, (change, *named) in lies.items()}


NAMES = ["../x", "/etc/passwd", "a/b.distcp", "..", ".", "", "\\x", "C:x", "a\0b", "a\nb", ".metadata", 7, None]
_NAMES: dict[str, Row] = {
    repr(name): (edit_metadata(place(W0, relative_path=name)), FC1, "not the name of a file in this folder")
    for name in NAMES
}
_NOTHING = both(lambda m: m.state_dict_metadata.clear(), lambda m: m.storage_data.clear())
_STRANGE: dict[str, Row] = {
    "empty": (text(METADATA, b""), METADATA),
    "zeros": (text(METADATA, bytes(999)), METADATA),
    "text": (text(METADATA, "{}"), METADATA),
    "a list": (text(METADATA, pickle.dumps([1])), METADATA, "not the metadata"),
    "a table": (text(METADATA, pickle.dumps({"state_dict_metadata": {}})), METADATA, "not the metadata"),
    "nothing in it": (edit_metadata(_NOTHING), "has no embedding"),
    "a torch file": (copied(COMMON, METADATA), METADATA),
    "a folder": (instead(METADATA, Path.mkdir), METADATA),
    "a pipe": (instead(METADATA, os.mkfifo), METADATA),
    "a device": (link(METADATA, "/dev/zero"), METADATA),
    "missing": (remove(METADATA), METADATA, "is missing"),
    "more behind it": (append(METADATA, b"N."), METADATA, "after the pickle"),
}
_STRANGE |= {f"cut at {part:.1%}": (cut(METADATA, part), METADATA) for part in (0.1, 0.5, 0.9, 0.999)}
_STRANGE |= {f"pickle: {name}": (_rewritten(change), METADATA) for name, change in BROKEN.items()}
_STRANGE |= {
    f"bomb: {name}": (edit_metadata(lambda m, v=value: m.state_dict_metadata.update(bomb=v)), METADATA)  # type: ignore[misc]
    for name, value in BOMBS.items()
}
_SWAPPED: dict[str, Row] = {
    "layers": (edit_metadata(swap(W0, W1)), METADATA),
    "layers of fc2": (edit_metadata(swap(at(FC2, 0, 0, 0), at(FC2, 3, 0, 0))), METADATA),
}
_FOREIGN: dict[str, Row] = {"metadata": (from_other(METADATA), ".distcp")}
METADATA_CASES = [
    *cases("metadata lies", "dist", _edited(_LIES)),
    *cases("metadata is of another model", "dist", _edited(_KEYS), ANY),
    *cases("metadata names a file elsewhere", "dist", _NAMES),
    *cases("same blobs in other places, --check", "dist", _SWAPPED, CkptconvError, wishes={"check": True}),
    *cases("metadata of a wider model", "dist", _FOREIGN, other="dist wide"),
    *cases("metadata of separate layers", "dist", _FOREIGN, other="dist separate"),
    *cases("metadata is no metadata", "dist", _STRANGE),
    *cases("flip in the metadata", "dist", flips(METADATA, whole, "all", ITERATION, 48), CkptconvError, harmless=True),
]

# -- several at once: one error names them all -----------------------------------------------------------------------

_ALL = both(
    _LIES["a chunk not described"][0],
    lambda m: setattr(m.state_dict_metadata[QKV].properties, "dtype", torch.complex64),
    lambda m: m.storage_data.pop(at(EXTRA)),
    place(at(NORM, 0), relative_path="../x"),
    lambda m: m.state_dict_metadata.pop(FC2),
)
_TOLD = ("__0_1.distcp: is missing", f"{FC1}: of ", "complex64", f"{EXTRA}: is an object", NORM, "'../x'", FC2)
_TWO = every(
    blob_of(bytes(99), W0),
    edit_metadata(both(place(W0, length=50), place(W1, relative_path="__9_9.distcp", offset=50, length=49))),
)
_MANY: dict[str, Row] = {
    "metadata and files": (every(remove(FILES[1]), edit_metadata(_ALL)), *_TOLD, "things are wrong"),
    "two blobs": (_TWO, "__9_9.distcp!0+50", "__9_9.distcp!50+49", "2 things are wrong"),
}
CASES: list[Case] = [*FILE_CASES, *METADATA_CASES, *cases("many things at once", "dist", _MANY)]
