"""Kinds of damage to distributed checkpoints (torch_dist): blobs and objects that are something else, code, the files beside."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from ckptconv.errors import ConfigError, ReplicaError
from tests.hostile.damage import (
    ITERATION,
    Act,
    Case,
    Row,
    cases,
    copied,
    cut,
    edit_args,
    edit_json,
    edit_pt,
    instead,
    link,
    remove,
    text,
)
from tests.hostile.damage_bits import Region, directory, end_record, flips, header_of
from tests.hostile.damage_dist import (
    ANY,
    COMMON,
    EXTRA,
    FC1,
    FILES,
    METADATA,
    NORM,
    TELLING,
    W0,
    W1,
    Change,
    at,
    blob_of,
    edit_metadata,
    every,
    place,
)
from tests.hostile.damage_pickle import BOMBS, gadgets


def saved(value: object) -> bytes:
    blob = io.BytesIO()
    torch.save(value, blob)
    return blob.getvalue()


def blob(index: MetadataIndex, inside: Region) -> Region:
    """A region of the blob of a chunk, counted in its file."""

    def region(path: Path) -> tuple[int, int]:
        info = pickle.loads(path.with_name(".metadata").read_bytes()).storage_data[index]
        alone = path.parents[2] / "blob"
        alone.write_bytes(path.read_bytes()[info.offset : info.offset + info.length])
        lo, hi = inside(alone)
        alone.unlink()
        return info.offset + lo, info.offset + hi

    return region


SHAPE = (1, 96, 32)  # of a chunk of fc1
HALF = torch.zeros(SHAPE, dtype=torch.bfloat16)
_BLOBS: dict[str, tuple[bytes, str]] = {
    "another shape": (saved(HALF.reshape(1, 32, 96)), "of shape (1, 32, 96)"),
    "no layer axis": (saved(HALF[0]), "of shape (96, 32)"),
    "another dtype": (saved(HALF.half()), "holds fp16"),
    "a wider dtype": (saved(HALF.float()), "holds fp32"),
    "a list": (saved([HALF]), "not a tensor"),
    "a table": (saved({"model": HALF}), "not a tensor"),
    "nothing": (saved(None), "not a tensor"),
    "zeros": (bytes(8000), "not a torch file"),
    "a pickle": (pickle.dumps([1]), "not a torch file"),
    "cut": (saved(HALF)[:-1], "zip end record"),
    "more behind it": (saved(HALF) + b"x", "zip end record"),
}
_LYING: dict[str, Row] = {
    name: (blob_of(content, W1), f"__9_9.distcp!0+{len(content)}", problem, FC1)
    for name, (content, problem) in _BLOBS.items()
}
_FLIPS: dict[str, Row] = {
    name: row
    for suffix in ("/data.pkl", "/data/0", "/version")
    for key, index in (("fc1", W0), ("norm", at(NORM, 0)))
    for name, row in flips(FILES[0], blob(index, header_of(suffix)), f"{key}{suffix}", ".distcp!", 6).items()
}
BLOB_CASES = [
    *cases("blob is something else", "dist", _LYING),
    *cases("flip in a blob's zip header", "dist", _FLIPS, harmless=True),
    *cases(
        "flip in a blob's zip directory",
        "dist",
        flips(FILES[0], blob(W0, directory), "fc1", ".distcp!", 24),
        harmless=True,
    ),
    *cases(
        "flip in a blob's zip end record",
        "dist",
        flips(FILES[0], blob(W0, end_record), "fc1", ".distcp!", 22),
        harmless=True,
    ),
]

# -- code ------------------------------------------------------------------------------------------------------------

_METADATA_PLACES: dict[str, Callable[[Any], Change]] = {
    "a table": lambda gadget: lambda m: m.state_dict_metadata.update(x=gadget),
    "a plan": lambda gadget: lambda m: setattr(m, "all_local_plans", [gadget]),
    "a place": lambda gadget: place(W0, relative_path=gadget),
}
_COMMON_PLACES: dict[str, Callable[[Any], Change]] = {
    "args": lambda gadget: lambda state: setattr(state["args"], "x", gadget),
    "a stray entry": lambda gadget: lambda state: state.update(x=gadget),
}
_CODE_BLOBS: dict[str, Row] = {}
_CODE_OBJECTS: dict[str, Row] = {}
_CODE_UNREAD: dict[str, Row] = {}
_CODE_METADATA: dict[str, Row] = {}
_CODE_COMMON: dict[str, Row] = {}
for _name, _gadget in gadgets().items():
    _CODE_BLOBS[_name] = (blob_of(saved(_gadget), W1), "__9_9.distcp!0+", FC1, "would run")
    # An object of a module is opened if it is larger than one that has nothing in it.
    _CODE_OBJECTS[_name] = (blob_of(saved([_gadget, "x" * 4000]), at(EXTRA)), "__9_9.distcp!0+", "would run")
    _CODE_UNREAD[_name] = (blob_of(saved([_gadget]), at(EXTRA)), "")
    for _where, _plant in _METADATA_PLACES.items():
        _CODE_METADATA[f"{_name} in {_where}"] = (edit_metadata(_plant(_gadget)), METADATA, "Do not trust this file")
    for _where, _plant in _COMMON_PLACES.items():
        _CODE_COMMON[f"{_name} in {_where}"] = (edit_pt(COMMON, _plant(_gadget)), COMMON, "would run")
CODE_CASES = [
    *cases("blob that would run code", "dist", _CODE_BLOBS),
    *cases("object that would run code", "dist", _CODE_OBJECTS),
    *cases("object that would run code, never opened", "dist", _CODE_UNREAD, harmless=True),
    *cases("metadata that would run code", "dist", _CODE_METADATA),
    *cases("common.pt that would run code", "dist", _CODE_COMMON),
]

# -- the files beside ------------------------------------------------------------------------------------------------


def _args(**values: object) -> Act:
    return edit_pt(COMMON, edit_args(**values))


def _alone(**values: object) -> Act:
    """No config lies beside that would say it better."""
    return every(remove("hf"), _args(**values))


def _told(**values: object) -> Act:
    return edit_json(TELLING, lambda table: table.update(values))


_STRANGE: dict[str, Row] = {
    "zarr": (_told(sharded_backend="zarr"), ITERATION),
    "unknown": (_told(sharded_backend="tensorstore"), TELLING, "sharded_backend is 'tensorstore'"),
    "nothing": (_told(sharded_backend=None), TELLING, "sharded_backend is None"),
    "a list": (_told(sharded_backend=["torch_dist"]), TELLING, "sharded_backend is ['torch_dist']"),
    "no entry": (edit_json(TELLING, lambda table: table.clear()), TELLING, "sharded_backend is None"),
    "not a table": (text(TELLING, '["torch_dist"]'), TELLING),
    "garbage": (text(TELLING, b"\xff{"), TELLING),
    "empty": (text(TELLING, b""), TELLING),
    "cut": (cut(TELLING, 0.5), TELLING),
    "twice": (text(TELLING, '{"sharded_backend": "zarr", "sharded_backend": "torch_dist"}'), TELLING),
    "deep": (text(TELLING, "[" * 100_000), TELLING),
    "endless": (lambda folder: os.truncate(folder / TELLING, 1 << 40), TELLING),
    "a folder": (instead(TELLING, Path.mkdir), TELLING),
    "a pipe": (instead(TELLING, os.mkfifo), TELLING),
    "a device": (link(TELLING, "/dev/zero"), TELLING),
}
_COMMON: dict[str, Row] = {
    "a list": (edit_pt(COMMON, lambda state: [state]), COMMON, "holds a list, expected a dictionary"),
    "args of text": (edit_pt(COMMON, lambda state: state.update(args="x")), COMMON, "args"),
    "empty": (text(COMMON, b""), COMMON),
    "garbage": (text(COMMON, bytes(999)), COMMON),
    "metadata": (copied(METADATA, COMMON), COMMON),
    "a folder": (instead(COMMON, Path.mkdir), COMMON),
    "a pipe": (instead(COMMON, os.mkfifo), COMMON),
    "a device": (link(COMMON, "/dev/zero"), COMMON),
}
_COMMON |= {f"cut at {part:.0%}": (cut(COMMON, part), COMMON) for part in (0.1, 0.5, 0.95)}
_COMMON |= {
    f"bomb: {name}": (edit_pt(COMMON, lambda state, v=value: state.update(x=v)), COMMON)  # type: ignore[misc]
    for name, value in BOMBS.items()
}
_LIES: dict[str, Row] = {
    "layers": (_args(num_layers=5), "layers: common.pt args says 5"),
    "hidden": (_args(hidden_size=64), "hidden: common.pt args says 64"),
    "heads": (_args(num_attention_heads=7), "heads: common.pt args says 7"),
    "experts": (_args(num_experts=8), "experts: common.pt args says 8"),
    "text": (_args(num_layers="four"), "common.pt args", "num_layers"),
    "endless": (_args(num_layers=1 << 60), "common.pt args", "num_layers"),
    "negative": (_args(num_layers=-4), "common.pt args", "num_layers"),
    "latent attention": (_args(multi_latent_attention=True), "common.pt args", "multi_latent_attention"),
    "layers, alone": (_alone(num_layers=5), "layers: common.pt args says 5, the tensors say 4"),
    "hidden, alone": (_alone(hidden_size=64), "hidden: common.pt args says 64, the tensors say 32"),
    "ffn, alone": (_alone(ffn_hidden_size=64), "ffn: common.pt args says 64, the tensors say 48"),
}
_TIED: dict[str, Row] = {"tied": (_alone(untie_embeddings_and_output_weights=False), "output_layer.weight")}
_ROWS: dict[str, Row] = {"vocabulary": (_alone(vocab_size=1 << 20), "--vocab-size")}
_FROM_ARGS = {"family": "hf-llama", "saver_options": {"config_from_args": True}}
# A config beside says it better where it fits the tensors.
_OVERRULED: dict[str, Row] = {
    "ffn": (_args(ffn_hidden_size=64), ""),
    "tied": (_args(untie_embeddings_and_output_weights=False), ""),
}
BESIDE_CASES = [
    *cases("metadata.json damaged", "dist", _STRANGE),
    *cases("metadata.json missing", "dist", {"gone": (remove(TELLING), "")}, harmless=True),
    *cases("common.pt damaged", "dist", _COMMON),
    *cases("args lie", "dist", _LIES, ANY),
    *cases("args alone lie of the output layer", "dist", _TIED, ReplicaError, wishes=_FROM_ARGS),
    *cases("args alone lie of the vocabulary", "dist", _ROWS, ConfigError, wishes=_FROM_ARGS),
    *cases("args are overruled", "dist", _OVERRULED, harmless=True),
]
CASES: list[Case] = [*BLOB_CASES, *CODE_CASES, *BESIDE_CASES]
