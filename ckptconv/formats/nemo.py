"""NeMo 1: `.nemo` archives and the folders they unpack to, of legacy and of Megatron-Core models."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.errors import TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron.dist_loading import TORCH_DIST, ZARR
from ckptconv.megatron.dist_saving import Filing
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.saving import vocab_rows
from ckptconv.megatron.versions import LOCAL, OLDEST, TE, Core, te_version
from ckptconv.nemo import loading, saving
from ckptconv.nemo.model_config_write import Form, refuse_inexpressible
from ckptconv.passes import FILLS
from ckptconv.plan import Plan
from ckptconv.topology import Topology, even


@dataclass(frozen=True, slots=True)
class NemoLoad:
    """What an archive may not say, or say wrongly."""

    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json that states the architecture instead"}
    )
    scratch: Path | None = field(default=None, metadata={"help": "folder to unpack a gzip'ed archive into, once"})
    tokenizer: Path | None = field(
        default=None, metadata={"help": "sentencepiece model, where the archive has none: says the true vocabulary"}
    )
    plain_rope: bool = field(
        default=False,
        metadata={
            "help": "ignore scale_positional_embedding, which NeMo 2.0 to 2.4 set for every llama they converted"
        },
    )


@dataclass(frozen=True, slots=True)
class NemoSave:
    """Which of NeMo's models the archive is for, and how it is filed."""

    mcore_gpt: bool | None = field(
        default=None,
        metadata={
            "help": "a Megatron-Core model, or (false) NeMo's own from before (default: as the source, else true)"
        },
    )
    weights: str | None = field(
        default=None,
        metadata={
            "help": "distributed (whole tensors) or ranks (a file each; needed for --tp and --pp) "
            "(default: ranks for legacy models and where a layout is asked for or the source has one)",
            "choices": ("distributed", "ranks"),
        },
    )
    backend: str | None = field(
        default=None,
        metadata={
            "help": f"of distributed weights: {TORCH_DIST} (default), or {ZARR} (NeMo up to 1.23)",
            "choices": (TORCH_DIST, ZARR),
        },
    )
    transformer_impl: str | None = field(
        default=None,
        metadata={
            "help": f"modules of Megatron-Core models (default: as the source, {TE} from other formats)",
            "choices": (TE, LOCAL),
        },
    )
    te_version: str = field(
        default="1.11", metadata={"help": "TransformerEngine that loads them: decides the kind of _extra_state"}
    )
    vocab_fill: str | None = field(
        default=None,
        metadata={
            "help": "new rows that pad the vocabulary: zero (default), as NeMo; last, the last true row again; mean, of all "
            "true rows",
            "choices": tuple(FILLS),
        },
    )
    tokenizer: Path | None = field(
        default=None, metadata={"help": "sentencepiece model to pack (default: the source's)"}
    )
    pack: bool = field(default=True, metadata={"help": "one .nemo file; false: the folder it unpacks to"})


class Nemo:
    """GPT models as NeMo saves them."""

    name = "nemo"
    summary = "NeMo 1 archives (.nemo), or the folder they unpack to"
    aliases: tuple[str, ...] = ("nemo1",)
    Load = NemoLoad
    Save = NemoSave

    def sniff(self, path: Path) -> bool:
        return loading.is_nemo(path)

    def load(self, path: Path, options: NemoLoad, request: Request) -> Stored:
        opened = loading.open_archive(path, options.scratch, options.tokenizer, plain_rope=options.plain_rope)
        return loading.load(path, opened, options.config, request, self.name)

    def target(self, checkpoint: Checkpoint, topology: Topology, options: NemoSave, request: Request) -> Target:
        config = checkpoint.config
        form = _form(options, saving.raw(checkpoint.extras), checkpoint.origin.variant)
        refuse_inexpressible(config, topology, form)
        rows = vocab_rows(config, topology, saving.divisor(config, checkpoint.extras, request))
        fill = _fill(options, config, rows)
        if _distributed(options, form, topology, checkpoint.origin.mapping):
            mixed = 0 < len(config.moe_layers) < config.layers
            mapping = chosen("mcore-dist" if mixed else "mcore-dist-stacked", request.mappings)
            return Target(mapping, frozenset({"norm_apart"}), even(config.layers), rows, fill)
        name = "nemo-legacy" if not form.mcore else "nemo-mcore" if form.transformer_engine else "nemo-mcore-local"
        variant = form.variant if not form.mcore else frozenset({"experts_sequential"})
        return Target(chosen(name, request.mappings), variant, topology, rows, fill)

    def save(self, stored: Stored, options: NemoSave, request: Request) -> Plan:
        return saving.save(stored, request, _archive(stored, options))

    def usage(self, stored: Stored, dst: str, options: NemoSave) -> str:
        lines = [
            "from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel",
            f"model = MegatronGPTModel.restore_from(restore_path={dst!r}, trainer=trainer)",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in saving.notes(stored, options.tokenizer))])


def _form(options: NemoSave, source: Dict[str, object], variant: frozenset[str]) -> Form:
    """As asked for, else as in a NeMo source, else for Megatron-Core with TransformerEngine."""
    core = source.get("mcore_gpt", True) is True
    mcore = core if options.mcore_gpt is None else options.mcore_gpt
    te = not (core and source.get("transformer_engine") is False)
    if options.transformer_impl is not None:
        te = options.transformer_impl == TE
    return Form(mcore, te, not mcore and "qkv_v0" in variant, not mcore and "gate_apart" in variant)


def _fill(options: NemoSave, config: ModelConfig, rows: int) -> str:
    """What new rows are. Where there are none, padding stays as it is, and nothing may be asked of it."""
    there = rows - (config.vocab or rows)
    if options.vocab_fill is not None and there and rows == config.vocab_rows:
        raise UsageError(
            f"--saver.vocab-fill {options.vocab_fill}: the {there} rows that pad the vocabulary are there already and stay as they "
            "are; leave the option out (a conversion to hf and back makes them anew)"
        )
    return options.vocab_fill or "zero"


def _distributed(options: NemoSave, form: Form, topology: Topology, mapping: str) -> bool:
    """Whether the weights are whole tensors in chunks."""
    cut = any(topology.degree(name) != 1 for name in ("tp", "pp", "vpp", "ep", "etp"))
    wanted = options.weights or (
        "ranks" if cut or not form.mcore or mapping.startswith("nemo-mcore") else "distributed"
    )
    if wanted == "distributed" and not form.mcore:
        raise UsageError(
            "--saver.weights distributed: NeMo has it for Megatron-Core models alone (--saver.mcore-gpt true)"
        )
    if wanted == "distributed" and cut:
        raise TopologyError(
            "distributed weights are whole tensors, cut when NeMo loads them: no --tp or --pp (--saver.weights ranks)"
        )
    if wanted != "distributed" and options.backend is not None:
        raise UsageError(
            f"--saver.backend {options.backend}: about distributed weights, and these are a file for each rank "
            "(--saver.weights distributed)"
        )
    return wanted == "distributed"


def _archive(stored: Stored, options: NemoSave) -> saving.Archive:
    """The same choices, from what was made of them."""
    form = _form(options, saving.raw(stored.extras), stored.variant)
    te = te_version(options.te_version) if form.mcore and form.transformer_engine else None
    return saving.Archive(
        form,
        ExtraState(Core(OLDEST), te, "sequential", legacy=not form.mcore),
        distributed="norm_apart" in stored.variant,
        filing=Filing(options.backend or TORCH_DIST, 2),
        tokenizer=options.tokenizer,
        pack=options.pack,
    )
