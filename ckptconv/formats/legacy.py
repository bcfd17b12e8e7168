"""Megatron-LM checkpoints from before Megatron-Core (and of `--use-legacy-models`), one file per process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Stored, Target
from ckptconv.errors import ConfigError, TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import loading, saving
from ckptconv.megatron.args_write import refuse_inexpressible
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.measure import LEGACY
from ckptconv.megatron.rank_file import RankContent
from ckptconv.megatron.stages import pipeline_args
from ckptconv.megatron.usage import usage
from ckptconv.megatron.versions import NEWEST, Core, core_version, show
from ckptconv.plan import Plan
from ckptconv.topology import Topology, even_counts, with_stages

ORDERS: dict[float, str] = {0: "qkv_v0", 1: "qkv_v1", 2: "qkv_v2", 3: "qkv_v2"}  # by checkpoint_version


@dataclass(frozen=True, slots=True)
class LegacyLoad:
    """What the files may not say, or say wrongly."""

    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json that states what args lack or have wrong"}
    )
    checkpoint_version: int | None = field(
        default=None,
        metadata={
            "help": "decides the order of query, key and value rows, for files that do not say it",
            "choices": tuple(ORDERS),
        },
    )


@dataclass(frozen=True, slots=True)
class LegacySave:
    """Written in the current form: checkpoint_version 3.0."""

    mcore_version: str = field(
        default=show(NEWEST), metadata={"help": "Megatron-LM release that loads the files, 0.9 to 0.16"}
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


class Legacy:
    """Megatron-LM's own GPT models: `model` is nested dictionaries, and QKV rows stand as checkpoint_version says."""

    name = "legacy"
    summary = "Megatron-LM before Megatron-Core, one file per process (--use-legacy-models)"
    aliases: tuple[str, ...] = ("megatron",)
    Load = LegacyLoad
    Save = LegacySave
    trains = True

    def sniff(self, path: Path) -> bool:
        return loading.sniff(path, legacy=True)

    def load(self, path: Path, options: LegacyLoad, request: Request) -> Stored:
        mapping = chosen("megatron-legacy", request.mappings)
        kind = loading.Kind(self.name, (mapping,), LEGACY, lambda content: _order(content, options))
        stored = loading.load(path, options.config, request, kind)
        if stored.config.kv_heads != stored.config.heads and not stored.variant & {"qkv_v2"}:
            raise ConfigError(
                f"{path}: {stored.config.kv_heads} key/value heads for {stored.config.heads} heads, but checkpoints of version 0 and 1 "
                "have one for each; state the version with --loader.checkpoint-version"
            )
        return stored

    def target(self, checkpoint: Checkpoint, topology: Topology, options: LegacySave, request: Request) -> Target:
        config = checkpoint.config
        core = Core(core_version(options.mcore_version))
        refuse_inexpressible(config, core, legacy=True)
        if topology.tp > config.kv_heads:
            raise UsageError(
                f"tp {topology.tp} is more than the {config.kv_heads} key/value heads: legacy models cannot be cut so; save as mcore"
            )
        if topology.ep > 1:
            raise UsageError("--ep: legacy models have no experts; save as mcore")
        _refuse_uneven(topology, config.layers)
        pipeline_args(topology, core)
        rows = saving.vocab_rows(config, topology, saving.divisor(checkpoint.extras, request))
        return Target(chosen("megatron-legacy", request.mappings), frozenset({"qkv_v2"}), topology, rows)

    def save(self, stored: Stored, options: LegacySave, request: Request) -> Plan:
        return saving.save(stored, options.iteration, request, _form(options))

    def usage(self, stored: Stored, dst: str, options: LegacySave) -> str:
        return usage(stored, dst, _form(options))


def _form(options: LegacySave) -> saving.Form:
    core = Core(core_version(options.mcore_version))
    return saving.Form(
        core, ExtraState(core, None, legacy=True), local=True, legacy=True, distributed=options.distributed_optimizer
    )


def _order(content: RankContent, options: LegacyLoad) -> frozenset[str]:
    """The order of QKV rows. Megatron takes a file without a version for version 0; one stripped of its args may be of any."""
    if options.checkpoint_version is not None:
        return frozenset({ORDERS[options.checkpoint_version]})
    if content.version is None and content.args is None:
        raise ConfigError(
            f"{content.file.name}: no checkpoint_version and no args: the order of query, key and value rows is not known; "
            "state it with --loader.checkpoint-version (3 for anything saved since 2021)"
        )
    return frozenset({ORDERS[content.version or 0]})


def _refuse_uneven(topology: Topology, layers: int) -> None:
    """Legacy models only ever split their layers evenly."""
    even = with_stages(topology, even_counts(layers, topology.pp, topology.vpp))
    if even.stages != topology.stages:
        raise TopologyError(
            "legacy models have the same number of layers on every stage; leave --pp-layers out, or save as mcore"
        )
