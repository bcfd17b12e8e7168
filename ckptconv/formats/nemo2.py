"""NeMo 2: folders of `weights/` (a distributed checkpoint) and `context/` (the model and its tokenizer)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Extras, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.containers import json_file, storage
from ckptconv.errors import ConfigError, FormatError, TopologyError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import hf_beside
from ckptconv.megatron.args_write import dynamic_rope
from ckptconv.megatron.dist_loading import ZARR, backend
from ckptconv.megatron.saving import vocab_notes, vocab_rows
from ckptconv.megatron.versions import LOCAL, PORTABLE_TE, TE, show
from ckptconv.nemo import context, context_write, distributed, folder_write, saving, tokenizer_files
from ckptconv.nemo.run_state import refuse_unfinished
from ckptconv.plan import Plan
from ckptconv.source import Source
from ckptconv.topology import Topology, even

WEIGHTS = folder_write.WEIGHTS
ADAPTERS = "adapter_metadata.json"
DEGREES = ("tp", "pp", "vpp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Nemo2Load:
    """What the context may not say, or say wrongly."""

    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json that states the architecture instead"}
    )


@dataclass(frozen=True, slots=True)
class Nemo2Save:
    """How weights are filed, and what goes with them."""

    transformer_impl: str = field(
        default=TE, metadata={"help": "modules that load it: decides the _extra_state entries", "choices": (TE, LOCAL)}
    )
    te_version: str = field(
        default=show(PORTABLE_TE),
        metadata={"help": "TransformerEngine that loads them: decides the kind of _extra_state"},
    )
    tokenizer: Path | None = field(
        default=None,
        metadata={
            "help": "sentencepiece model or folder of a Hugging Face tokenizer to put in (default: the source's)"
        },
    )


class Nemo2:
    """GPT models as NeMo 2 saves them."""

    name = "nemo2"
    summary = "NeMo 2 checkpoints: a folder of weights/ and context/"
    aliases: tuple[str, ...] = ()
    Load = Nemo2Load
    Save = Nemo2Save

    def sniff(self, path: Path) -> bool:
        there = path.is_dir() and ((path / WEIGHTS).is_dir() or distributed.is_distributed(path))
        return there and context.has_context(path)

    def load(self, path: Path, options: Nemo2Load, request: Request) -> Stored:
        folder = _weights(path)
        told = context.read(path)
        beside = hf_beside.find(options.config, None, request)
        if told is None and beside.config is None:
            raise ConfigError(
                f"{path}: neither {context.FOLDER}/{context.YAML} nor io.json is there, so the architecture is not known; "
                "give --loader.config HF_DIR"
            )
        said = context.statement(told) if told is not None and beside.config is None else None
        if told is not None and request.family is None and beside.config is None:
            request = replace(request, family=told.family)
        _, run = distributed.read_common(folder)
        stored = distributed.load(folder, run, said, beside, request, self.name)
        if told is None:
            return stored
        objects = {**stored.extras.objects, self.name: told.raw}
        notes = (*(told.notes if said is not None else ()), *stored.extras.notes)
        extras = replace(stored.extras, files={**told.files, **stored.extras.files}, objects=objects, notes=notes)
        return replace(stored, config=replace(stored.config, dtype=told.dtype), extras=extras)

    def storage(self, path: Path, request: Request) -> dict[str, object]:
        folder = _weights(path)
        return (storage.zarr if backend(folder) == ZARR else storage.torch_dist)(folder, distributed.USED)

    def target(self, checkpoint: Checkpoint, topology: Topology, options: Nemo2Save, request: Request) -> Target:
        config = checkpoint.config
        if given := [name for name in DEGREES if topology.degree(name) != 1]:
            flags = ", ".join(f"--{name}" for name in given)
            raise TopologyError(f"a NeMo 2 checkpoint holds whole tensors, cut when NeMo loads it: no {flags} for it")
        context_write.refuse_inexpressible(config)
        mixed = 0 < len(config.moe_layers) < config.layers
        mapping = chosen("mcore-dist" if mixed else "mcore-dist-stacked", request.mappings)
        rows = vocab_rows(config, topology, _divisor(config, checkpoint.extras, request))
        return Target(mapping, frozenset({"norm_apart"}), even(config.layers), rows, "zero")

    def save(self, stored: Stored, options: Nemo2Save, request: Request) -> Plan:
        tokenizer = _tokenizer(options.tokenizer, stored.extras)
        divisor = _divisor(stored.config, stored.extras, request)
        te = None if options.transformer_impl == LOCAL else options.te_version
        plan = folder_write.save(stored, divisor, tokenizer, te)
        return replace(plan, about={**plan.about, "format_notes": list(vocab_notes(stored, request))})

    def usage(self, stored: Stored, dst: str, options: Nemo2Save) -> str:
        lines = [
            "import nemo.lightning as nl",
            f"resume = nl.AutoResume(restore_config=nl.RestoreConfig(path={dst!r}))  # for llm.finetune or llm.pretrain",
            f"or: from nemo.collections import llm; llm.export_ckpt(path={dst!r}, target='hf')",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in dynamic_rope(stored.config, "NeMo"))])


def _weights(path: Path) -> Path:
    """The folder of the distributed checkpoint; the oldest have no folder for it."""
    refuse_unfinished(path)
    folder = path / WEIGHTS if (path / WEIGHTS).is_dir() else path
    if (folder / ADAPTERS).exists():
        base = json_file.read(folder / ADAPTERS).get("model_ckpt_path")
        raise FormatError(
            folder,
            f"holds adapters (LoRA or the like) of {base!r} and no model: merge them in NeMo (llm.peft.merge_lora)",
        )
    return folder


def _divisor(config: ModelConfig, extras: Extras, request: Request) -> int:
    """What rows are padded to a multiple of: as asked for, as in a NeMo source, or what makes padding least."""
    kept = extras.objects.get(Nemo2.name)
    value = kept.get("make_vocab_size_divisible_by") if isinstance(kept, dict) else None
    if request.vocab_divisor is None and isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    return saving.divisor(config, extras, request)


def _tokenizer(given: Path | None, extras: Extras) -> dict[str, Source]:
    """The tokenizer's files by their usual names."""
    return dict(extras.files) if given is None else tokenizer_files.given(given, "--saver.tokenizer")
