"""NeMo 1: `.nemo` archives and the folders they unpack to, of legacy and of Megatron-Core models."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.errors import TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen
from ckptconv.megatron.dist_loading import TORCH_DIST, ZARR
from ckptconv.megatron.dist_saving import Filing
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.versions import LOCAL, OLDEST, TE, Core, te_version
from ckptconv.nemo import loading, neva, neva_config, saving
from ckptconv.nemo.model_config_write import Form, refuse_inexpressible
from ckptconv.nemo.neva import Encoder
from ckptconv.nemo.settings import TARGET
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
        default=None,
        metadata={
            "help": "sentencepiece model or folder of a Hugging Face tokenizer, where the archive has none: says the true vocabulary, "
            "and travels along"
        },
    )
    vision_encoder: Path | None = field(
        default=None,
        metadata={"help": "Hugging Face folder of the image encoder that NeVA did not train, and so has left out"},
    )
    vision_heads: int | None = field(
        default=None, metadata={"help": "attention heads of an image encoder in the file, if its sizes are not known"}
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
    vision_encoder: str | None = field(
        default=None,
        metadata={
            "help": "of NeVA: name or path that NeMo loads the image encoder by (default: the source's, or a published one's)"
        },
    )
    frozen_vision: bool = field(
        default=False,
        metadata={"help": "of NeVA: leave the image encoder out, as NeMo does with one that it does not train"},
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
        default=None,
        metadata={
            "help": "sentencepiece model to pack, or folder of a Hugging Face tokenizer that NeMo is to load (default: the source's)"
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "name or folder that NeMo loads a Hugging Face tokenizer by (default: what the source is called)"
        },
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
        encoder = Encoder(options.vision_encoder, options.vision_heads)
        return loading.load(path, opened, options.config, encoder, request, self.name)

    def target(self, checkpoint: Checkpoint, topology: Topology, options: NemoSave, request: Request) -> Target:
        config = checkpoint.config
        form = _form(options, saving.raw(checkpoint.extras), checkpoint.origin.variant)
        saving.refuse_alone(config, checkpoint.extras, topology)
        refuse_inexpressible(config, topology, form)
        rows = saving.rows(checkpoint, topology, _tokenizer(options), request)
        fill = _fill(options, config, rows)
        distributed = _distributed(options, form, topology, _has_ranks(checkpoint))
        name, variant = _language(form, config, distributed=distributed)
        mapping = chosen(name, request.mappings)
        if neva_config.is_neva(config):
            mapping, beginning = neva.target_mapping(config, name)
            variant |= beginning
        if options.frozen_vision:
            mapping = _without_encoder(mapping)
        return Target(mapping, variant, even(config.layers) if distributed else topology, rows, fill)

    def save(self, stored: Stored, options: NemoSave, request: Request) -> Plan:
        return saving.save(stored, request, _archive(stored, options))

    def usage(self, stored: Stored, dst: str, options: NemoSave) -> str:
        module, _, name = (neva_config.TARGET if neva_config.is_neva(stored.config) else TARGET).rpartition(".")
        lines = [
            f"from {module} import {name}",
            f"model = {name}.restore_from(restore_path={dst!r}, trainer=trainer)",
        ]
        told = saving.notes(stored, _tokenizer(options), _encoder(options))
        return "\n".join([*lines, *(f"note: {note}" for note in told)])


def _form(options: NemoSave, source: Dict[str, object], variant: frozenset[str]) -> Form:
    """As asked for, else as in a NeMo source, else for Megatron-Core with TransformerEngine."""
    core = source.get("mcore_gpt", True) is True
    mcore = core if options.mcore_gpt is None else options.mcore_gpt
    te = not (core and source.get("transformer_engine") is False)
    if options.transformer_impl is not None:
        te = options.transformer_impl == TE
    return Form(mcore, te, not mcore and "qkv_v0" in variant, not mcore and "gate_apart" in variant)


def _encoder(options: NemoSave) -> neva_config.Encoder:
    return neva_config.Encoder(options.vision_encoder, options.frozen_vision)


def _tokenizer(options: NemoSave) -> saving.GivenTokenizer:
    return saving.GivenTokenizer(options.tokenizer, options.tokenizer_name)


def _without_encoder(mapping: Mapping) -> Mapping:
    """A mapping with no place for the image encoder."""
    rules = tuple(rule for rule in mapping.rules if rule.scope != "vision")
    return replace(mapping, rules=rules, omit=(*mapping.omit, "vision.*"))


def _has_ranks(checkpoint: Checkpoint) -> bool:
    """Whether the source is an archive with a file for each rank."""
    language = neva.language_of(checkpoint.origin.mapping)
    return language.startswith("nemo-mcore") or saving.has_rank_files(checkpoint.extras)


def _language(form: Form, config: ModelConfig, *, distributed: bool) -> tuple[str, frozenset[str]]:
    """The dialect of the language model and its variant."""
    if distributed:
        mixed = 0 < len(config.moe_layers) < config.layers
        return "mcore-dist" if mixed else "mcore-dist-stacked", frozenset({"norm_apart"})
    if not form.mcore:
        return "nemo-legacy", form.variant
    return "nemo-mcore" if form.transformer_engine else "nemo-mcore-local", frozenset({"experts_sequential"})


def _fill(options: NemoSave, config: ModelConfig, rows: int) -> str:
    """What new rows are. Where there are none, padding stays as it is, and nothing may be asked of it."""
    there = rows - (config.vocab or rows)
    if options.vocab_fill is not None and there and rows == config.vocab_rows:
        raise UsageError(
            f"--saver.vocab-fill {options.vocab_fill}: the {there} rows that pad the vocabulary are there already and stay as they "
            "are; leave the option out (a conversion to hf and back makes them anew)"
        )
    return options.vocab_fill or "zero"


def _distributed(options: NemoSave, form: Form, topology: Topology, ranks: bool) -> bool:
    """Whether the weights are whole tensors in chunks; `ranks`: in the source they are files of ranks."""
    cut = any(topology.degree(name) != 1 for name in ("tp", "pp", "vpp", "ep", "etp"))
    wanted = options.weights or ("ranks" if cut or not form.mcore or ranks else "distributed")
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


def _is_distributed(stored: Stored, options: NemoSave, form: Form) -> bool:
    """What `target` chose; a projector alone has the same names either way."""
    if stored.config.kind == "projector":
        return _distributed(options, form, stored.topology, saving.has_rank_files(stored.extras))
    return "norm_apart" in stored.variant


def _archive(stored: Stored, options: NemoSave) -> saving.Archive:
    """The same choices, from what was made of them."""
    form = _form(options, saving.raw(stored.extras), stored.variant)
    te = te_version(options.te_version) if form.mcore and form.transformer_engine else None
    return saving.Archive(
        form,
        ExtraState(Core(OLDEST), te, "sequential", legacy=not form.mcore),
        distributed=_is_distributed(stored, options, form),
        filing=Filing(options.backend or TORCH_DIST, 2),
        tokenizer=_tokenizer(options),
        encoder=_encoder(options),
        pack=options.pack,
    )
