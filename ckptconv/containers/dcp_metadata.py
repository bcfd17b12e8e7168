"""The `.metadata` of a torch distributed checkpoint, read as data: what it says of tensors, objects and where they lie.

Every spelling of its classes that torch and Megatron-Core have used is known by name; nothing is imported. What the
file says is taken down here as it stands, and each thing that is not even well-formed is listed; `dcp.py` checks the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short_repr
from typing import NamedTuple, TypeGuard

from ckptconv.containers.pickled import Global, Known, Opaque, TorchDType
from ckptconv.containers.plain_calls import Args, Call
from ckptconv.containers.ranges import HeaderReader, locate
from ckptconv.containers.unpickle import Unpickler
from ckptconv.errors import FormatError
from ckptconv.source import Source
from ckptconv.tensor import Shape

NAME = ".metadata"
MAX_METADATA = 1 << 31
MAX_AXES = 64
MAX_SIZE = 1 << 62
MAX_KEY = 1024
CHUNK_BYTES = 8  # of a pickle that a chunk needs at the very least

METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_PLANNER = "torch.distributed.checkpoint.planner"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # where torch had TensorProperties until 2.3
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"

SIZE = Global("torch", "Size")
# The classes and their fields in order, as a call names them.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "Metadata": ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"),
    "TensorStorageMetadata": ("properties", "size", "chunks"),
    "BytesStorageMetadata": (),
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "TensorProperties": ("dtype", "layout", "requires_grad", "memory_format", "pin_memory"),
    "MetadataIndex": ("fqn", "offset", "index"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}
# What only helps the next save along; its content is not looked at.
_PLANS = ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")


class Piece(NamedTuple):
    """A chunk as `.metadata` has it."""

    offset: Shape
    shape: Shape


class Told(NamedTuple):
    """A tensor as `.metadata` has it; the dtype is torch's name."""

    dtype: str
    shape: Shape
    pieces: list[Piece]


class Place(NamedTuple):
    """Where one chunk of a tensor (or, without offset, an object) is said to lie."""

    offset: Shape | None
    file: str
    start: int
    nbytes: int


class Metadata(NamedTuple):
    """All that is of use in `.metadata`; `problems` lists what is not well-formed, `keys` has the keys of that too."""

    keys: set[str]
    tensors: dict[str, Told]
    objects: list[str]
    places: dict[str, list[Place]]
    reformulated: dict[str, Shape]
    problems: list[str]


def read_metadata(place: Path | Source, where: str = "") -> Metadata:
    """Parse the file; FormatError where it is not a pickle of the class that it should be."""
    source = locate(place)
    where = where or source.path
    root = _unpickle(source, where)
    state = root.state if isinstance(root, (Known, Opaque)) else None
    if not isinstance(state, dict) or not {"state_dict_metadata", "storage_data"} <= state.keys():
        raise FormatError(where, f"holds {_kind(root)}, not the metadata of a torch distributed checkpoint")
    told, stored = state["state_dict_metadata"], state["storage_data"]
    if not isinstance(told, dict) or not isinstance(stored, dict):
        kind = type(stored if isinstance(told, dict) else told).__name__
        raise FormatError(where, f"its tables of tensors and of places are not dicts but a {kind}")
    if sum(map(_chunk_count, told.values())) > source.nbytes // CHUNK_BYTES:
        raise FormatError(where, "describes the same chunks over and over (a bomb)")
    found = Metadata(set(), {}, [], {}, {}, [])
    for key, value in told.items():
        _take_entry(found, key, value)
    for index, info in stored.items():
        _take_place(found, index, info)
    _take_reformulated(found, state.get("mcore_data"))
    return found


def _unpickle(source: Source, where: str) -> object:
    if source.nbytes > MAX_METADATA:
        raise FormatError(where, f"has {source.nbytes} bytes; more than {MAX_METADATA} are not read")
    with HeaderReader(source, where) as reader:
        data = reader.read(0, source.nbytes, "the metadata")
    unpickler = Unpickler(data, where, _CALLS)
    root = unpickler.load()
    if unpickler.pos != len(data):
        raise FormatError(where, f"has {len(data) - unpickler.pos} bytes after the pickle")
    return root


def _chunk_count(value: object) -> int:
    chunks = fields(value).get("chunks")
    return len(chunks) if isinstance(chunks, list) else 0


def _take_entry(found: Metadata, key: object, value: object) -> None:
    kind = value.cls.name if isinstance(value, Known) else ""
    if not is_key(key):
        found.problems.append(f"the key {short_repr(key)} is not text of at most {MAX_KEY} characters")
        return
    found.keys.add(key)
    if kind == "BytesStorageMetadata":
        found.objects.append(key)
    elif kind == "TensorStorageMetadata":
        told = _tensor(fields(value))
        if isinstance(told, str):
            found.problems.append(f"{key}: {told}")
        else:
            found.tensors[key] = told
    else:
        found.problems.append(f"{key}: is neither a tensor nor bytes, but {_kind(value)}")


def _tensor(state: Mapping[str, object]) -> Told | str:
    """A tensor, or what is wrong with it."""
    dtype, size, chunks = fields(state.get("properties")).get("dtype"), state.get("size"), state.get("chunks")
    if not isinstance(dtype, TorchDType):
        return f"has dtype {short_repr(dtype)}, which is not one of torch's"
    if not is_shape(size):
        return f"has shape {short_repr(size)}"
    if not isinstance(chunks, list):
        return f"has chunks {short_repr(chunks)}, not a list"
    pieces = []
    for chunk in chunks:
        state = fields(chunk)
        offset, shape = state.get("offsets"), state.get("sizes")
        if not _is_sizes(offset) or not is_shape(shape) or not len(offset) == len(shape) == len(size):
            return f"of {len(size)} axes, has a chunk at {short_repr(offset)} of shape {short_repr(shape)}"
        pieces.append(Piece(offset, shape))
    return Told(dtype.name, size, pieces)


def _take_place(found: Metadata, index: object, info: object) -> None:
    where, place = fields(index), fields(info)
    key, offset = where.get("fqn"), where.get("offset")
    if not is_key(key) or not (offset is None or _is_sizes(offset)):
        found.problems.append(f"something is stored that is not named by a key: {short_repr(key)} {short_repr(offset)}")
        return
    name, start, nbytes = place.get("relative_path"), place.get("offset"), place.get("length")
    at = f"{key}{_text(offset)}"
    if not isinstance(name, str) or not is_plain_name(name):
        found.problems.append(f"{at}: lies in {short_repr(name)}, which is not the name of a file in this folder")
    elif type(start) is not int or type(nbytes) is not int:
        found.problems.append(f"{at}: lies at {short_repr(start)}+{short_repr(nbytes)} of {name}")
    elif place.get("transform_descriptors"):
        how = short_repr(place["transform_descriptors"])
        found.problems.append(f"{at}: is stored transformed ({how}), which is not supported; save it without")
    else:
        found.places.setdefault(key, []).append(Place(offset, name, start, nbytes))


def _take_reformulated(found: Metadata, told: object) -> None:
    """The true shapes of tensors that Megatron-Core (up to 0.15) flattened: {key: {"nd_reformulated_…": shape}}."""
    for key, about in told.items() if isinstance(told, dict) else ():
        if isinstance(about, dict) and "nd_reformulated_orig_global_shape" in about:
            shape = about["nd_reformulated_orig_global_shape"]
            if not is_key(key) or not is_shape(shape):
                found.problems.append(f"{short_repr(key)}: was flattened from a shape {short_repr(shape)}")
            else:
                found.reformulated[key] = shape


def fields(value: object) -> dict[str, object]:
    """The fields of an object of a known class, whether it was pickled by its state or by a call; else none."""
    if not isinstance(value, Known):
        return {}
    if isinstance(value.state, tuple):
        return dict(zip(FIELDS.get(value.cls.name, ()), value.state, strict=False))
    return value.state if isinstance(value.state, dict) else {}


def is_plain_name(name: str) -> bool:
    """Whether a name stands for a file of the folder itself, wherever it is opened."""
    return (
        len(name) < 256 and name.isprintable() and not re.search(r"[/\\:]", name) and name not in ("", ".", "..", NAME)
    )


def is_key(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) <= MAX_KEY


def is_shape(value: object) -> TypeGuard[Shape]:
    return _is_sizes(value) and all(n >= 0 for n in value)


def _is_sizes(value: object) -> TypeGuard[Shape]:
    if not isinstance(value, tuple) or len(value) > MAX_AXES:
        return False
    for n in value:  # noqa: SIM110 - three times as fast as all(), and asked for every chunk
        if type(n) is not int or not -MAX_SIZE <= n <= MAX_SIZE:
            return False
    return True


def _text(offset: Shape | None) -> str:
    return "" if offset is None else f" {list(offset)}"


def _kind(value: object) -> str:
    if isinstance(value, Opaque):
        return f"a {value.module}.{value.name}"
    return f"a {value.cls}" if isinstance(value, Known) else short_repr(value)


def _size(u: Unpickler, args: Args) -> object:
    """A torch.Size is a plain tuple to us."""
    match args:
        case (tuple() as size,) if _is_sizes(size):
            return size
        case (list() as size,) if _is_sizes(tuple(size)):
            u.charge(len(size))
            return tuple(size)
    raise ValueError(f"a torch.Size is made of {short_repr(args)}")


def _known(cls: Global) -> Call:
    return lambda u, args: Known(cls, args or None)


_CALLS: Mapping[Global, Call] = {
    SIZE: _size,
    **{
        cls: _known(cls)
        for cls in (
            *(Global(METADATA, name) for name in FIELDS if name != "_StorageInfo"),
            Global(FILESYSTEM, "_StorageInfo"),
            Global(_SHARDED, "TensorProperties"),
            *(Global(_PLANNER, name) for name in _PLANS),
            Global(_MEGATRON, "MCoreMetadata"),
            Global(_MEGATRON, "MCoreSavePlan"),
        )
    },
}
