"""Checkpoints that Lightning saved while NeMo trained: .ckpt files per rank, FSDP shards, distributed folders; only read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckptconv.checkpoint import Stored
from ckptconv.formats import ReadOnly, Request
from ckptconv.nemo import distributed, lightning, model_config


@dataclass(frozen=True, slots=True)
class LightningLoad:
    """What the saved hyper parameters may not say, or say wrongly."""

    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json that states the architecture instead"}
    )


class Lightning(ReadOnly):
    """One .ckpt file (the other ranks' are found), the folder of rank folders, or the folder of a distributed checkpoint.

    A distributed one looks like Megatron-Core's and so is never recognised by itself: it has to be named.
    """

    name = "lightning"
    summary = "checkpoints of NeMo's training (.ckpt per rank, FSDP shards, distributed folders); only read"
    aliases: tuple[str, ...] = ("ptl",)
    Load = LightningLoad

    def sniff(self, path: Path) -> bool:
        if path.is_file():
            return path.suffix == lightning.SUFFIX
        if not path.is_dir() or (path / model_config.NAME).exists():  # an unpacked archive has rank folders too
            return False
        return any(any(folder.glob(f"*{lightning.SUFFIX}")) for folder in lightning.rank_folders(path))

    def load(self, path: Path, options: LightningLoad, request: Request) -> Stored:
        if path.is_dir() and distributed.is_distributed(path):
            return lightning.load_distributed(path, options.config, request, self.name)
        return lightning.load_ranks(path, options.config, request, self.name)
