"""Projectors saved alone (mm_projector.bin of LLaVA and NeVA): one file with one or two layers. Only read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptconv.checkpoint import Key, Stored
from ckptconv.config import ModelConfig, projector_config
from ckptconv.dialect import detect
from ckptconv.errors import CkptconvError, FormatError
from ckptconv.formats import NoOptions, ReadOnly, Request
from ckptconv.huggingface.files import read_tensors
from ckptconv.mapping_files import chosen
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, even

TAIL = "mm_projector."


class MmProjector(ReadOnly):
    """Files that LLaVA's and NeVA's training writes for a projector trained alone."""

    name = "mm-projector"
    summary = "a projector alone: mm_projector.bin of LLaVA or NeVA (read only)"
    aliases: tuple[str, ...] = ()
    Load = NoOptions

    def sniff(self, path: Path) -> bool:
        try:
            return (
                path.is_file() and path.suffix in (".bin", ".safetensors") and _is_projector(read_tensors(path, False))
            )
        except CkptconvError:
            return False

    def load(self, path: Path, options: NoOptions, request: Request) -> Stored:
        if not path.is_file():
            raise FormatError(path, "is not a file; expected a projector's mm_projector.bin")
        tensors = read_tensors(path, request.check)
        if not _is_projector(tensors):
            found = ", ".join(sorted(tensors)[:4]) or "nothing"
            raise FormatError(path, f"no projector: expected model.{TAIL}0.weight and .2.weight, found {found}")
        config = _config(tensors, path)
        ranks = {Rank(): {Key(name): tensor for name, tensor in tensors.items()}}
        mapping, variant = detect([chosen("mm-projector", request.mappings)], config, even(0), ranks)
        return Stored(self.name, mapping, variant, even(0), config, ranks, {Rank(): str(path)})


def _is_projector(tensors: dict[str, Tensor]) -> bool:
    ends = {name.rpartition(TAIL)[2] for name in tensors}
    return bool(tensors) and ends <= {"0.weight", "0.bias", "2.weight", "2.bias", "weight", "bias"}


def _config(tensors: dict[str, Tensor], path: Path) -> ModelConfig:
    """Everything about it can be measured but its activation, which is LLaVA's."""
    shapes = {name.rpartition(TAIL)[2]: tensor.shape for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        if name.endswith("weight") and len(shape) != 2:
            raise FormatError(path, f"{TAIL}{name} has shape {shape}, expected two axes")
    first, last = (shapes.get(name, (0, 0)) for name in ("0.weight", "2.weight"))
    if "weight" in shapes:
        hidden, inputs = shapes["weight"]
        return replace(projector_config(inputs, 0, hidden, mlp_bias="bias" in shapes), linear=True)
    return projector_config(first[-1], first[0], last[0], mlp_bias="0.bias" in shapes)
