"""Condenses real distributed checkpoints that have their Hugging Face model beside them: names, shapes, and where every element comes from.

usage: python tests/golden/mcore/manifests/make.py CASE...      (CASE holds ckpt/iter_* and hf/; see README.md)
Nothing of ckptconv is used: elements are found again by their values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

RUN = 16  # elements: no framework cuts or moves fewer here, and so many random ones are like no others
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def runs(tensor: torch.Tensor) -> NDArray[Any]:
    """The bytes of every run, a row each."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1, RUN * tensor.element_size())


def places(model: dict[str, torch.Tensor]) -> dict[bytes, int]:
    """run -> index of its first element, all tensors laid end to end."""
    found: dict[bytes, int] = {}
    for tensor in model.values():
        for row in map(np.ndarray.tobytes, runs(tensor)):
            if row in found:
                raise SystemExit("two runs of the model are alike")
            found[row] = len(found) * RUN
    return found


def origins(tensor: torch.Tensor, known: dict[bytes, int]) -> str:
    """The digest of the index in the model of every element."""
    first = np.array([known[row.tobytes()] for row in runs(tensor)], np.int32)
    return xxhash.xxh64_hexdigest((first[:, None] + np.arange(RUN, dtype=np.int32)).tobytes())


def read(folder: Path) -> dict[str, torch.Tensor]:
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in tensors.items()}
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return dict(sorted(state.items()))


def manifest(case: Path) -> dict[str, object]:
    config = json.loads((case / "hf" / "config.json").read_text())
    model = dict(sorted(load_file(case / "hf" / "model.safetensors").items()))
    known = places(model)
    stored = {}
    for key, tensor in read(next((case / "ckpt").glob("iter_*"))).items():
        true = tensor[: config["vocab_size"]] if key in VOCABULARY else tensor
        stored[key] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), origins(true, known)]
    return {"config.json": config, "hf": {name: list(t.shape) for name, t in model.items()}, "stored": stored}


def text(case: dict[str, object]) -> str:
    """A line for each name."""
    tables = []
    for title, table in case.items():
        assert isinstance(table, dict)
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
        tables.append(f"{json.dumps(title)}: {{\n{rows}\n}}")
    return "{\n" + ",\n".join(tables) + "\n}\n"


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        (Path(__file__).parent / f"{argument.name}.json").write_text(text(manifest(argument)))
