"""The files of a Hugging Face folder that is written: weights in shards with their index, and files that are copied."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from collections.abc import Mapping as Dict

from ckptconv.containers import safetensors
from ckptconv.dtypes import UINT8
from ckptconv.huggingface.files import INDEX
from ckptconv.leaves import contiguous
from ckptconv.plan import File, Segment
from ckptconv.source import Source
from ckptconv.tensor import Tensor


def split(tensors: Dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Shards as huggingface_hub makes them: in order, greedily; a tensor above the limit has its own shard at once."""
    shards: list[dict[str, Tensor]] = []
    current: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.nbytes
        if nbytes > limit:
            shards.append({name: tensor})
            continue
        if size + nbytes > limit:
            shards.append(current)
            current, size = {}, 0
        current[name] = tensor
        size += nbytes
    return shards + ([current] if current else [])


def weight_files(tensors: Dict[str, Tensor], limit: int) -> list[File]:
    """The weight files, and their index if there are several."""
    shards = split(tensors, limit)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    files = [safetensors.layout(name, shard, {"format": "pt"}) for name, shard in zip(names, shards, strict=True)]
    if len(shards) == 1:
        return files
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
            "total_size": sum(t.nbytes for t in tensors.values()),
        },
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    return [*files, final(INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())]


def final(path: str, text: bytes) -> File:
    return File(path, len(text), (Segment(0, text),), final=True)


def copied(name: str, source: Source) -> File:
    body: Iterable[Segment] = [Segment(0, contiguous(source, (source.nbytes,), UINT8), name)] if source.nbytes else []
    return File(name, source.nbytes, tuple(body))
