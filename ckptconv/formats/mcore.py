"""Megatron-Core checkpoints, one file per process (`--ckpt-format torch`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.errors import UsageError
from ckptconv.formats import Request
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen
from ckptconv.megatron import loading, saving, towers
from ckptconv.megatron.args_write import refuse_inexpressible
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.measure import MCORE
from ckptconv.megatron.stages import pipeline_args
from ckptconv.megatron.usage import usage
from ckptconv.megatron.versions import LOCAL, NEWEST, PORTABLE_TE, TE, Core, Version, core_version, show, te_version
from ckptconv.plan import Plan
from ckptconv.topology import Topology

EXPERTS = {"te-grouped": "experts_te", "sequential": "experts_sequential", "grouped": "experts_grouped"}


@dataclass(frozen=True, slots=True)
class McoreLoad:
    """What the files may not say, or say wrongly."""

    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json that states what args lack or have wrong"}
    )
    vision_heads: int | None = field(
        default=None,
        metadata={"help": "attention heads of the vision tower (without dummy ones), if no config says them"},
    )


@dataclass(frozen=True, slots=True)
class McoreSave:
    """Which modules and versions the files are for."""

    transformer_impl: str | None = field(
        default=None,
        metadata={
            "help": f"modules of the model (default: as the source, {TE} from other formats)",
            "choices": (TE, LOCAL),
        },
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "form of the experts (default: as the source, te-grouped from other formats)",
            "choices": tuple(EXPERTS),
        },
    )
    mcore_version: str = field(
        default=show(NEWEST), metadata={"help": "oldest Megatron-Core that must load the files, 0.9 to 0.16"}
    )
    te_version: str = field(
        default=show(PORTABLE_TE),
        metadata={
            "help": "TransformerEngine that loads them: decides the kind of _extra_state entries (the default loads in 1.13 and newer)"
        },
    )
    iteration: int | str | None = field(
        default=None, metadata={"help": "iteration to save as, or release (default: the source's; 1 from Hugging Face)"}
    )
    distributed_optimizer: bool | None = field(
        default=None,
        metadata={
            "help": "optimizer state as flat buffers in distrib_optim.pt, or with each rank's model (default: as the source)"
        },
    )


class Mcore:
    """Megatron-Core GPT models as `iter_XXXXXXX/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`."""

    name = "mcore"
    summary = "Megatron-Core, one file per process (--ckpt-format torch)"
    aliases: tuple[str, ...] = ("core", "megatron-core")
    Load = McoreLoad
    Save = McoreSave
    trains = True

    def sniff(self, path: Path) -> bool:
        return loading.sniff(path, legacy=False)

    def load(self, path: Path, options: McoreLoad, request: Request) -> Stored:
        mappings, vision, multimodal = (
            (chosen(name, request.mappings), chosen(f"{name}-local", request.mappings))
            for name in ("mcore", "mcore-vision", "mcore-vlm")
        )
        kind = loading.Kind(
            self.name,
            mappings,
            MCORE,
            lambda _: frozenset(),
            multimodal=multimodal,
            vision=vision,
            heads=options.vision_heads,
        )
        return loading.load(path, options.config, request, kind)

    def target(self, checkpoint: Checkpoint, topology: Topology, options: McoreSave, request: Request) -> Target:
        config = checkpoint.config
        core, te = _versions(options)
        local = _wants_local(checkpoint, options, request)
        if config.kind == "vision":
            return _vision_target(config, topology, local, request)
        refuse_inexpressible(config, core, legacy=False)
        pipeline_args(topology, core)
        if topology.ep > 1 and not config.experts:
            raise UsageError(f"--ep {topology.ep}: the model has no experts, and Megatron-Core then refuses to start")
        experts = _experts(checkpoint, options, core, te, local) if config.experts else "te-grouped"
        if config.experts and topology.etp != topology.tp and not core.expert_sizes:
            raise UsageError(
                f"--etp {topology.etp} with tp {topology.tp}: Megatron-Core {show(core.version)} cuts experts as the rest; 0.10 is newer"
            )
        name = "mcore-vlm" if config.towers else "mcore"
        mapping = _without_excess(chosen(f"{name}-local" if local else name, request.mappings), core)
        if config.kv_heads < topology.tp and not mapping.excess:
            raise UsageError(
                f"tp {topology.tp} is more than the {config.kv_heads} key/value heads: Megatron-Core before 0.16 refuses that; "
                "choose a smaller --tp or --mcore-version 0.16"
            )
        rows = saving.vocab_rows(config, topology, saving.divisor(checkpoint.extras, request))
        heads = towers.padded_heads(config, topology.tp)
        return Target(mapping, frozenset({EXPERTS[experts]}), topology, rows, heads=heads)

    def save(self, stored: Stored, options: McoreSave, request: Request) -> Plan:
        return saving.save(stored, options.iteration, request, _form(stored, options))

    def usage(self, stored: Stored, dst: str, options: McoreSave) -> str:
        return usage(stored, dst, _form(stored, options))


def _vision_target(config: ModelConfig, topology: Topology, local: bool, request: Request) -> Target:
    """A tower alone is only ever cut for tensor parallelism."""
    given = [f"--{name} {n}" for name in ("pp", "vpp", "ep") if (n := topology.degree(name)) > 1]
    if given:
        raise UsageError(
            f"{' '.join(given)}: a vision tower alone is cut for tensor parallelism only; combine it first"
        )
    mapping = chosen("mcore-vision-local" if local else "mcore-vision", request.mappings)
    return Target(mapping, frozenset(), topology, config.vocab_rows, heads=towers.padded_heads(config, topology.tp))


def _form(stored: Stored, options: McoreSave) -> saving.Form:
    core, te = _versions(options)
    local = is_local(stored.mapping)
    experts = next((name for name, tag in EXPERTS.items() if tag in stored.variant), "")
    return saving.Form(
        core,
        ExtraState(core, None if local else te, experts),
        local=local,
        experts=experts,
        distributed=options.distributed_optimizer,
    )


def is_local(mapping: Mapping) -> bool:
    """Whether the names are those of Megatron-Core's own modules; a user's mapping may extend them."""
    return any(name.startswith("mcore") and name.endswith("-local") for name in (mapping.name, mapping.extends or ""))


def _wants_local(checkpoint: Checkpoint, options: McoreSave, request: Request) -> bool:
    """Whether Megatron's own modules are wanted: as asked for, else as in the source."""
    if options.transformer_impl is not None:
        return options.transformer_impl == LOCAL
    origin = checkpoint.origin
    return origin.format == Mcore.name and is_local(chosen(origin.mapping, request.mappings))


def _versions(options: McoreSave) -> tuple[Core, Version]:
    return Core(core_version(options.mcore_version)), te_version(options.te_version)


def _experts(checkpoint: Checkpoint, options: McoreSave, core: Core, te: Version, local: bool) -> str:
    """The form asked for, or the source's, or the usual one; refused where the modules do not exist."""
    origin = checkpoint.origin
    source = next((n for n, tag in EXPERTS.items() if origin.format == "mcore" and tag in origin.variant), None)
    wanted = options.experts or source or "te-grouped"
    if options.experts is None and wanted == "te-grouped" and (local or te < (1, 9)):
        return "sequential"
    if wanted == "te-grouped" and (local or te < (1, 9)):
        raise UsageError(
            f"--saver.experts te-grouped needs --saver.transformer-impl {TE} with TransformerEngine 1.9 or newer"
        )
    if wanted == "grouped" and not local and te >= (1, 9) and core.version < (0, 11):
        raise UsageError(
            f"--saver.experts grouped: Megatron-Core {show(core.version)} takes TEGroupedMLP wherever TransformerEngine has it (1.9); "
            f"use --saver.transformer-impl {LOCAL}, or 0.11 with --moe-use-legacy-grouped-gemm"
        )
    return wanted


def _without_excess(mapping: Mapping, core: Core) -> Mapping:
    return mapping if core.cuts_assembled_qkv else replace(mapping, excess={})
