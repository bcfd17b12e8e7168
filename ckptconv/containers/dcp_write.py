"""Laying out a torch distributed checkpoint: .distcp files of blobs back to back, and the `.metadata` that says where they lie.

Nothing in it tells where or by whom it was made: the same input gives the same bytes. Byte layout: docs/formats/torch_dist.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from ckptconv.assemble import Box
from ckptconv.collecting import no_collecting
from ckptconv.containers import dcp_tiling, torch_write
from ckptconv.containers.dcp_metadata import FILESYSTEM, METADATA, NAME, SIZE
from ckptconv.containers.pickled import Global, Known, Opaque, TorchDType
from ckptconv.containers.pickler import Pickler
from ckptconv.dtypes import DType
from ckptconv.errors import PlanError
from ckptconv.leaves import full
from ckptconv.plan import File, Late, Segment
from ckptconv.tensor import Shape, Tensor

VERSION = "1.0.0"  # of the metadata's form, as torch writes it
ROOT = "archive"  # what torch calls the folder in a file that it does not know the name of

METADATA_CLASS = Global(METADATA, "Metadata")
TENSOR = Global(METADATA, "TensorStorageMetadata")
OBJECT = Global(METADATA, "BytesStorageMetadata")
CHUNK = Global(METADATA, "ChunkStorageMetadata")
INDEX = Global(METADATA, "MetadataIndex")
PROPERTIES = Global(METADATA, "TensorProperties")
PLACE = Global(FILESYSTEM, "_StorageInfo")
CLASSES = frozenset(map(str, (METADATA_CLASS, TENSOR, OBJECT, CHUNK, INDEX, PROPERTIES, PLACE, SIZE)))

Boxes = Sequence[Box]


class _Blob(NamedTuple):
    """A torch file that will stand in a .distcp file. Its bodies are those of `form` unless `tensor` takes their place."""

    key: str
    box: Box | None  # of the tensor; None: an object
    form: File
    tensor: Tensor | None
    name: str


def layout(
    prefix: str,
    tensors: Mapping[str, tuple[Tensor, Boxes]],
    objects: Mapping[str, object] | None = None,
    *,
    files: int = 1,
    allowed: Collection[str] = (),
) -> list[File]:
    """The files of a checkpoint under `prefix`, `.metadata` last.

    Each tensor comes with the boxes it is cut into; they must tile it. Each object is written just as it is given
    (Megatron-Core wants a list of one); keys that share an object had better share it, for each is pickled once.
    Blobs go into `files` files of about the same size. What an object may name beyond plain data: see `torch_write.layout`.
    """
    with no_collecting():
        blobs = _blobs(tensors, objects or {}, allowed)
        chosen = _deal([blob.form.size for blob in blobs], files)
        at = f"{prefix}/" if prefix else ""
        out, places = [], dict[int, Known]()
        for number, members in enumerate(chosen):
            name, joined = f"__0_{number}.distcp", _Joined()
            for i in members:
                places[i] = _record(PLACE, relative_path=name, offset=joined.size, length=blobs[i].form.size)
                joined.add(blobs[i])
            out.append(joined.file(at + name))
        return [*out, _metadata(at + NAME, tensors, blobs, places)]


def _blobs(
    tensors: Mapping[str, tuple[Tensor, Boxes]], objects: Mapping[str, object], allowed: Collection[str]
) -> list[_Blob]:
    """Objects first, as Megatron-Core has them, then the chunks of each tensor."""
    problems = [f"{key} is both a tensor and an object" for key in objects.keys() & tensors.keys()]
    forms = dict[object, File]()  # chunks of one shape, and keys of one object, differ in nothing but the data
    out = []
    for key, value in objects.items():
        form = forms.get(id(value)) or torch_write.layout(ROOT, value, allowed=allowed)
        forms[id(value)] = form
        out.append(_Blob(key, None, form, None, key))
    for key, (tensor, boxes) in tensors.items():
        problems += [f"{key}: {problem}" for problem in dcp_tiling.problems(tensor.shape, boxes)]
        for box in () if problems else boxes:
            chunk = _narrowed(tensor, box)
            kind = (chunk.shape, chunk.dtype)
            form = forms.get(kind) or torch_write.layout(ROOT, full(*kind, 0))
            forms[kind] = form
            name = key if len(boxes) == 1 else f"{key}{dcp_tiling.text(box)}"
            out.append(_Blob(key, box, form, chunk, name))
    if problems:
        raise PlanError("the chunks cannot be written:\n  " + "\n  ".join(problems))
    return out


def _narrowed(tensor: Tensor, box: Box) -> Tensor:
    for axis, (lo, hi) in enumerate(box):
        tensor = tensor.narrow(axis, lo, hi)
    return tensor


def _deal(sizes: Sequence[int], files: int) -> list[list[int]]:
    """Which blobs each file gets: the largest first, each to the file that has least; then in their old order."""
    loads = [(0, number) for number in range(max(1, min(files, len(sizes))))]
    chosen: list[list[int]] = [[] for _ in loads]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, number = loads[0]
        chosen[number].append(i)
        heapq.heapreplace(loads, (load + sizes[i], number))
    return [sorted(members) for members in chosen]


class _Joined:
    """Blobs back to back. All that stands between two tensors is one segment, so the n-th tensor is segment 2n + 1."""

    def __init__(self) -> None:
        self.size = 0
        self.segments: list[Segment] = []
        self.tensors = 0
        self.between = bytearray()
        self.crcs: list[tuple[int, int]] = []

    def add(self, blob: _Blob) -> None:
        bodies = [i for i, s in enumerate(blob.form.segments) if isinstance(s.body, Tensor)]
        index = {i: 2 * (self.tensors + n) + 1 for n, i in enumerate(bodies)}
        for segment in blob.form.segments:
            body = segment.body
            if isinstance(body, Tensor):
                self._flush()
                name = blob.name if blob.tensor else f"{blob.name}/{segment.name.removeprefix('/')}"
                self.segments.append(Segment(self.size, blob.tensor or body, name))
                self.tensors += 1
            elif isinstance(body, Late):
                self.crcs += [(len(self.between) + at, index[i]) for at, i in body.crcs]
                self.between += body.template
            else:
                self.between += body
            self.size += segment.nbytes

    def file(self, path: str) -> File:
        self._flush()
        return File(path, self.size, tuple(self.segments))

    def _flush(self) -> None:
        content = bytes(self.between)
        body = Late(content, tuple(self.crcs)) if self.crcs else content
        if content:
            self.segments.append(Segment(self.size - len(content), body))
        self.between.clear()
        self.crcs.clear()


# -- the metadata -----------------------------------------------------------------------------------------------------


def _metadata(
    path: str, tensors: Mapping[str, tuple[Tensor, Boxes]], blobs: Sequence[_Blob], places: Mapping[int, Known]
) -> File:
    """The pickle that torch's and Megatron-Core's readers load, whichever version of the classes they have."""
    sizes, kinds = dict[Shape, Opaque](), dict[DType, Opaque]()

    def size(shape: Shape) -> Opaque:
        return sizes.setdefault(shape, Opaque(SIZE.module, SIZE.name, (shape,)))

    told, stored = dict[str, Known](), dict[Known, Known]()
    chunks: dict[str, list[Known]] = {key: [] for key in tensors}
    for i, blob in enumerate(blobs):
        if blob.box is None:
            told[blob.key], index = Known(OBJECT), _record(INDEX, fqn=blob.key)
        else:
            offset = size(tuple(lo for lo, _ in blob.box))
            shape = size(tuple(hi - lo for lo, hi in blob.box))
            chunks[blob.key].append(_record(CHUNK, offsets=offset, sizes=shape))
            index = _record(INDEX, fqn=blob.key, offset=offset)
        stored[index] = places[i]
    for key, (tensor, _) in tensors.items():
        kind = kinds.setdefault(tensor.dtype, _properties(tensor.dtype))
        told[key] = _record(TENSOR, properties=kind, size=size(tensor.shape), chunks=chunks[key])
    # Megatron-Core up to 0.15 looks for mcore_data, which speaks of flattened tensors; there are none.
    tables: dict[str, object] = {"state_dict_metadata": told, "planner_data": None, "storage_data": stored}
    root = _record(METADATA_CLASS, **tables, version=VERSION, mcore_data={})
    data = Pickler(path, CLASSES).dump(root)
    return File(path, len(data), (Segment(0, data),), final=True)


def _properties(dtype: DType) -> Opaque:
    """A call and not a state: the state holds an enum that torch has moved, while the first parameter was always the dtype."""
    return Opaque(PROPERTIES.module, PROPERTIES.name, (TorchDType(dtype.torch),))


def _record(cls: Global, **state: object) -> Known:
    return Known(cls, state)
