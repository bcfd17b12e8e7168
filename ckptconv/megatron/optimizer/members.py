"""The parameters of one process as its optimizer numbers them: in which order, and in which group.

Megatron stores no names beside optimizer state. The order is that of `named_parameters`, in which the rank files hold the
model; the rest follows from rules of its optimizer, which are these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass

from ckptconv.config import ModelConfig
from ckptconv.dtypes import DType
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Topology

Settings = dict[str, object]

_EXPERT = re.compile(r"\.experts\.")
_EMBEDDING = re.compile(r"(?:^|\.)(?:word_embeddings(?:_for_head)?|output_layer)\.weight$")
_QK_NORM = re.compile(r"\.[qk]_layernorm\.")
FROZEN = {"freeze_LM": "language_model.", "freeze_ViT": "vision_model."}  # args of multimodal training
_WEIGHT_DECAY = ("wd_mult", "pre_wd_mult", "weight_decay")  # Megatron, NeMo, files older than wd_mult


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter. `decays`: its group has weight decay; `expert`: it belongs to the optimizer of experts; `alone`: its
    flat buffer gives it a bucket of its own.
    """

    chunk: int
    name: str
    shape: Shape
    dtype: DType
    decays: bool
    expert: bool
    alone: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the membership depends on beside name and shape. `frozen`: how the names of parameters begin that are not trained."""

    experts_apart: bool
    embedding_apart: bool
    norms_of_qk_decay: bool = False
    frozen: tuple[str, ...] = ()

    def members(self, chunks: Sequence[Dict[str, Tensor]]) -> list[Member]:
        """Of all model chunks of a process, whose tensors stand in the order of the modules."""
        return [
            self._member(i, name, t)
            for i, chunk in enumerate(chunks)
            for name, t in chunk.items()
            if not name.startswith(self.frozen)
        ]

    def _member(self, chunk: int, name: str, tensor: Tensor) -> Member:
        return Member(
            chunk,
            name,
            tensor.shape,
            tensor.dtype,
            self._decays(name, tensor.shape),
            self.experts_apart and bool(_EXPERT.search(name)),
            self.embedding_apart and bool(_EMBEDDING.search(name)),
        )

    def _decays(self, name: str, shape: Shape) -> bool:
        if _QK_NORM.search(name) and self.norms_of_qk_decay:
            return True
        return len(shape) > 1 and not name.endswith(".bias")


def rules(config: ModelConfig, topology: Topology, args: Dict[str, object]) -> Rules:
    """Of a run with these args."""
    frozen = tuple(prefix for name, prefix in FROZEN.items() if args.get(name) is True)
    return Rules(topology.ep > 1, config.tied and topology.pp > 1, args.get("apply_wd_to_qk_layernorm") is True, frozen)


def has_decay(settings: Settings) -> bool:
    """Which of the two kinds of param group this is."""
    return next((settings[key] for key in _WEIGHT_DECAY if key in settings), 1) != 0


def of_experts(settings: Settings) -> bool:
    return settings.get("is_expert_parallel") is True
