"""What a run is: the model, its vision tower, the layout over processes and the training; read from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-style decoder; with `experts`, every MLP is a mixture of them. `seq` counts tokens, not image patches."""

    sees: ClassVar[bool] = False
    layers: int = 4
    hidden: int = 32
    ffn: int = 64
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 256
    seq: int = 32
    tied: bool = False
    qkv_bias: bool = False
    experts: int = 0
    topk: int = 2
    dropout: float = 0.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """A CLIP-style tower: square images of `image` pixels in patches of `patch`, and a class token that is not handed on."""

    sees: ClassVar[bool] = True
    layers: int = 2
    hidden: int = 32
    ffn: int = 64
    heads: int = 4
    image: int = 16
    patch: int = 8
    norm_eps: float = 1e-5

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


@dataclass(frozen=True, slots=True)
class LayoutConfig:
    """How the model is spread; the processes that are left over form data-parallel copies. Experts are cut by tp too."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything that decides the loss curve beside the model. `warmup` and `decay` count samples, as in Megatron's scheduler."""

    steps: int = 20
    global_batch: int = 8
    micro_batch: int = 2
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup: int = 16
    decay: int = 800
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    seed: int = 1
    precision: str = "fp32"  # or bf16 with float32 masters; or fp64, computed in it over numbers kept in float32
    distributed_optimizer: bool = False
    freeze: tuple[str, ...] = ()  # how names of parameters begin that are not trained
    format: str = "torch"  # a file per rank, or torch_dist
    data: str = "text"  # or captions or questions

    @property
    def compute(self) -> torch.dtype:
        return {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]

    @property
    def stored(self) -> torch.dtype:
        """The dtype of parameters in a checkpoint."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def gradients(self) -> torch.dtype:
        return torch.float64 if self.precision == "fp64" else torch.float32


@dataclass(frozen=True, slots=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig | None = None
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def positions(self) -> int:
        """The length of what the decoder sees: image patches stand before the text."""
        return self.model.seq + (self.vision.patches if self.vision else 0)

    def at(self, **layout: int) -> Config:
        """The same run spread otherwise."""
        return replace(self, layout=LayoutConfig(**layout))

    def but(self, **training: Any) -> Config:
        """The same run with other settings of its training."""
        return replace(self, training=replace(self.training, **training))

    def check(self, world: int) -> int:
        """How many data-parallel copies `world` processes hold; an error that lists all that does not fit."""
        m, v, t, at = self.model, self.vision, self.training, self.layout
        dp = max(world // (at.tp * at.pp), 1)
        micro_batches = t.global_batch // (t.micro_batch * dp)
        rules = [
            (world == at.tp * at.pp * dp, f"{world} processes are no multiple of tp {at.tp} x pp {at.pp}"),
            (m.hidden % m.heads == 0, f"hidden {m.hidden} is no multiple of heads {m.heads}"),
            (m.heads % m.kv_heads == 0, f"heads {m.heads} are no multiple of kv_heads {m.kv_heads}"),
            (m.kv_heads % at.tp == 0, f"kv_heads {m.kv_heads} are no multiple of tp {at.tp}"),
            (m.ffn % at.tp == 0, f"ffn {m.ffn} is no multiple of tp {at.tp}"),
            (m.vocab % at.tp == 0 and m.vocab >= 256, f"vocab {m.vocab} must hold 256 bytes and be a multiple of tp {at.tp}"),
            (m.layers % (at.pp * at.vpp) == 0, f"layers {m.layers} are no multiple of pp {at.pp} x vpp {at.vpp}"),
            (at.vpp == 1 or at.pp > 1, "vpp needs pp of at least 2"),
            (dp % at.ep == 0, f"{dp} data-parallel copies are no multiple of ep {at.ep}"),
            (at.ep == 1 or (m.experts > 0 and m.experts % at.ep == 0), f"experts {m.experts} are no multiple of ep {at.ep}"),
            (m.experts == 0 or 0 < m.topk <= m.experts, f"topk {m.topk} is not within experts {m.experts}"),
            (t.global_batch == micro_batches * t.micro_batch * dp,
             f"global_batch {t.global_batch} is no multiple of micro_batch {t.micro_batch} x {dp} data-parallel copies"),
            (at.vpp == 1 or micro_batches % at.pp == 0, f"with vpp, {micro_batches} micro-batches must be a multiple of pp"),
            (t.precision in ("fp64", "fp32", "bf16"), f"precision is {t.precision!r}, known are fp64, fp32, bf16"),
            (t.decay > t.warmup, f"decay {t.decay} must come after warmup {t.warmup}"),
            (t.format in ("torch", "torch_dist"), f"format is {t.format!r}, known are torch, torch_dist"),
            (not v or {"language_model.", "vision_model."}.issuperset(t.freeze),
             f"freeze is {t.freeze}: of a model with a vision tower, args can say language_model. and vision_model. only"),
            (not v or (v.heads % at.tp == 0 and v.ffn % at.tp == 0), f"vision heads or ffn are no multiple of tp {at.tp}"),
            (not v or (v.hidden % v.heads == 0 and v.image % v.patch == 0), "vision heads or patches do not fit"),
            (t.data in (("captions", "questions") if v else ("text",)),
             f"data is {t.data!r}: models with a vision tower train on captions or questions, others on text"),
        ]  # fmt: skip
        if wrong := [said for good, said in rules if not good]:
            raise ValueError("this run cannot be: " + "; ".join(wrong))
        return dp


TABLES = {"model": ModelConfig, "vision": VisionConfig, "layout": LayoutConfig, "training": TrainingConfig}


def read(path: Path) -> Config:
    """The tables [model], [vision], [layout], [training] of a TOML file; what it does not say keeps its default."""
    sections: dict[str, Any] = {}
    for name, table in tomllib.loads(path.read_text()).items():
        if name not in TABLES:
            raise ValueError(f"{path}: unknown table [{name}]; known are {', '.join(TABLES)}")
        known = [f.name for f in fields(TABLES[name])]
        if strange := sorted(table.keys() - set(known)):
            raise ValueError(f"{path} [{name}]: unknown settings {strange}; known are {', '.join(known)}")
        sections[name] = TABLES[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()})
    return Config(**sections)
