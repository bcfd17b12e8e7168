"""Projectors saved alone (mm_projector.bin of LLaVA and NeVA): one file with one or two layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Key, Stored, Target
from ckptconv.config import ModelConfig, projector_config
from ckptconv.containers import torch_write
from ckptconv.dialect import detect
from ckptconv.errors import CkptconvError, ConfigError, FormatError, UsageError
from ckptconv.formats import NoOptions, Request, refuse_more_than_weights
from ckptconv.huggingface.files import read_tensors
from ckptconv.mapping_files import chosen
from ckptconv.nemo.neva_config import problems
from ckptconv.plan import Plan
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology, even

TAIL = "mm_projector."


class MmProjector:
    """Files that LLaVA's and NeVA's training writes for a projector trained alone, and begins with."""

    name = "mm-projector"
    summary = "a projector alone: mm_projector.bin of LLaVA or NeVA"
    aliases: tuple[str, ...] = ()
    Load = NoOptions
    Save = NoOptions

    def sniff(self, path: Path) -> bool:
        try:
            return path.is_file() and _is_projector(read_tensors(path, False))
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

    def target(self, checkpoint: Checkpoint, topology: Topology, options: NoOptions, request: Request) -> Target:
        config = checkpoint.config
        if config.kind != "projector" or config.towers:
            raise UsageError(
                "mm-projector files hold a projector alone: take it out with ckptconv extract SRC DST --part projector"
            )
        if found := list(problems(config)):
            raise ConfigError("\n  ".join(["LLaVA, which reads mm-projector files, has no way to say:", *found]))
        refuse_more_than_weights(checkpoint, topology, request, "mm-projector")
        mapping = chosen("mm-projector", request.mappings)
        names = frozenset(group[0] for group in mapping.variants)  # those that LLaVA finds, whatever the source's
        return Target(mapping, names, even(0), config.vocab_rows)

    def save(self, stored: Stored, options: NoOptions, request: Request) -> Plan:
        (tensors,) = stored.ranks.values()
        state = {key.name: tensor for key, tensor in tensors.items()}
        return Plan((torch_write.layout("mm_projector.bin", state),), single=True)

    def usage(self, stored: Stored, dst: str, options: NoOptions) -> str:
        kind = "linear" if stored.config.linear else "mlp2x_gelu"
        return (
            f"For LLaVA's training: --mm_projector_type {kind} --pretrain_mm_mlp_adapter {dst}\n"
            f"As a whole model: ckptconv combine LM TOWER DST --saver hf --as llava --projector {dst}"
        )


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
