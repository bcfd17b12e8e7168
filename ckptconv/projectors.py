"""New projectors: what each kind of multimodal model has between its vision tower and its language model, filled reproducibly."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ckptconv import coding
from ckptconv.checkpoint import Checkpoint, Key, Origin
from ckptconv.config import ModelConfig, projector_config
from ckptconv.dtypes import FP32, DType
from ckptconv.errors import ConfigError, UsageError
from ckptconv.leaves import contiguous
from ckptconv.mapping_files import load_mapping
from ckptconv.nodes import Fill
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import even
from ckptconv.values import Cast

LARGEST_STD = 1e3  # far beyond any use, and far from what fp16 cannot hold


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of multimodal model: what it makes of patches, its projector, and its family at Hugging Face.

    `own_code` is the family for a language model whose code transformers does not have.
    """

    patches: int = 1  # as many of which come into the projector at once
    norm: bool = False
    bias: bool = True
    as_mlp: bool = False  # as wide as the language model's mlp, not as its hidden size
    family: str | None = None
    own_code: str | None = None

    def projector(self, vision: ModelConfig, language: ModelConfig) -> ModelConfig:
        width = language.ffn if self.as_mlp else language.hidden
        return projector_config(
            self.patches * vision.hidden, width, language.hidden, pre_norm=self.norm, mlp_bias=self.bias
        )


KINDS = {
    "llava": Kind(family="hf-llava"),
    "neva": Kind(),
    "nvlm": Kind(patches=4, norm=True, bias=False, as_mlp=True, family="hf-nvlm"),
    "internvl": Kind(patches=4, norm=True, family="hf-internvl", own_code="hf-internvl-chat"),
}


def kind_named(name: str) -> Kind:
    if name not in KINDS:
        raise UsageError(f"--as {name}: expected one of {', '.join(KINDS)}")
    return KINDS[name]


def check_kind(config: ModelConfig, name: str) -> None:
    """What --as says must be what the projector takes, and has."""
    vision, projector = config.towers["vision"], config.towers.get("projector")
    if projector is None:
        return
    kind = kind_named(name)
    wanted = kind.projector(vision, config)
    if projector.inputs != wanted.inputs:
        raise ConfigError(
            f"--as {name}: its projector takes {kind.patches} x {vision.hidden} entries of the vision tower, "
            f"but this one takes {projector.inputs}"
        )
    if projector.pre_norm != wanted.pre_norm:
        has = ("none", "a norm of what comes in")
        raise ConfigError(
            f"--as {name}: its projector has {has[wanted.pre_norm]}, this one has {has[projector.pre_norm]}"
        )


def new_projector(how: str, name: str | None, vision: ModelConfig, language: ModelConfig, dtype: DType) -> Checkpoint:
    """A projector of the sizes that the kind has: its matrices as `how` says, norms that change nothing, no biases but zeros."""
    if name is None:
        raise UsageError("--init-projector: --as says which projector the model has; give it")
    config = replace(kind_named(name).projector(vision, language), dtype=dtype)
    std, seed = _read(how)
    mapping = load_mapping("mcore-vlm")
    tensors: dict[Key, Tensor] = {}
    for atom, row in mapping.vocabulary.expected(config):
        shape = row.shape(config)
        if atom.endswith("norm.weight"):
            tensors[Key(atom)] = _cast(Fill(shape, FP32, 0x3F800000), dtype)
        elif std and atom.endswith(".weight"):
            tensors[Key(atom)] = _cast(_normal(shape, std, seed, atom), dtype)
        else:
            tensors[Key(atom)] = Fill(shape, dtype)
    return Checkpoint(config, tensors, Origin("new", mapping.name, frozenset(), even(0)))


def _read(how: str) -> tuple[float, int]:
    """(standard deviation, seed) of normal:STD:SEED; zeros has neither."""
    if how == "zeros":
        return 0.0, 0
    found = re.fullmatch(r"normal:(\d*\.?\d+(?:e-?\d+)?):(\d{1,19})", how)
    std, seed = (float(found[1]), int(found[2])) if found else (0.0, 0)
    if not 0 < std < LARGEST_STD:
        raise UsageError(f"--init-projector {how}: expected zeros, or normal:STD:SEED such as normal:0.02:1")
    return std, seed


def _normal(shape: Shape, std: float, seed: int, name: str) -> Tensor:
    return contiguous(coding.normal(math.prod(shape), std, seed, name), shape, FP32)


def _cast(tensor: Tensor, dtype: DType) -> Tensor:
    return tensor if dtype == FP32 else tensor.map(Cast(FP32, dtype), dtype)
