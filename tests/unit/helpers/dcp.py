"""For tests of torch distributed checkpoints: folders made from torch's own classes, and torch's own reader."""

from __future__ import annotations

import io
import pickle
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from ckptconv.assemble import Box


def save(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """Written by torch, in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        torch_save(state, storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by torch's reader, into memory that held something else."""
    reader = FileSystemReader(folder)
    told = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.full(value.size, 1, dtype=torch.uint8).to(value.properties.dtype)
        for key, value in told.items()
        if isinstance(value, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_load(state, storage_reader=reader, no_dist=True)
    return state


def load_objects(folder: Path) -> dict[str, Any]:
    """All objects of a folder, by torch's reader."""
    reader = FileSystemReader(folder)
    told = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {key: None for key, value in told.items() if isinstance(value, BytesStorageMetadata)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_load(state, storage_reader=reader, no_dist=True)
    return state


def grid(rng: random.Random, shape: Sequence[int], cuts: int) -> list[Box]:
    """Boxes that tile a shape: cut in two at random, again and again, in any order."""
    boxes: list[Box] = [tuple((0, n) for n in shape)]
    for _ in range(cuts):
        box = boxes.pop(rng.randrange(len(boxes)))
        axes = [i for i, (lo, hi) in enumerate(box) if hi - lo > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = rng.choice(axes)
        lo, hi = box[axis]
        at = rng.randrange(lo + 1, hi)
        boxes += [(*box[:axis], part, *box[axis + 1 :]) for part in ((lo, at), (at, hi))]
    rng.shuffle(boxes)
    return boxes


def handmade(
    folder: Path,
    tensors: Mapping[str, tuple[torch.Tensor, Sequence[Box]]],
    objects: Mapping[str, Any] | None = None,
    *,
    files: int = 1,
    edit: Callable[[Metadata], object] = lambda metadata: None,
    protocol: int = 4,
) -> Path:
    """A folder put together from torch's classes and torch.save; `edit` may change the metadata before it is pickled."""
    folder.mkdir(parents=True, exist_ok=True)
    out = [(folder / f"__{i}_0.distcp").open("wb") for i in range(files)]
    told: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}

    def put(index: MetadataIndex, content: Any) -> None:
        file = out[len(stored) % files]
        blob = io.BytesIO()
        torch.save(content, blob)
        stored[index] = _StorageInfo(Path(file.name).name, file.tell(), len(blob.getvalue()))
        file.write(blob.getvalue())

    for key, content in (objects or {}).items():
        told[key] = BytesStorageMetadata()
        put(MetadataIndex(key), content)
    for key, (tensor, boxes) in tensors.items():
        chunks = []
        for box in boxes:
            offsets = torch.Size(lo for lo, _ in box)
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(hi - lo for lo, hi in box)))
            put(MetadataIndex(key, offsets), tensor[tuple(slice(lo, hi) for lo, hi in box)].clone())
        told[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), chunks)
    for file in out:
        file.close()
    metadata = Metadata(told, None, stored)
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    return folder
