"""Megatron-Core distributed checkpoints (`--ckpt-format torch_dist`, or zarr): whole tensors, in chunks, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckptconv.checkpoint import Checkpoint, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.containers import storage
from ckptconv.errors import TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import dist_loading, dist_saving, run_config, saving, towers
from ckptconv.megatron.args_write import refuse_inexpressible
from ckptconv.megatron.dist_loading import TORCH_DIST, ZARR
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.folders import DIGESTS, MEGATRONS, is_distributed, is_plain, looks_like, open_distributed
from ckptconv.megatron.usage import usage
from ckptconv.megatron.versions import LOCAL, NEWEST, PORTABLE_TE, TE, Core, core_version, show, te_version
from ckptconv.plan import Plan
from ckptconv.topology import Topology, even

LAYERS = {"stacked": "mcore-dist-stacked", "separate": "mcore-dist"}
MULTIMODAL = {"stacked": "mcore-dist-vlm-stacked", "separate": "mcore-dist-vlm"}
DEGREES = ("tp", "pp", "vpp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class McoreDistLoad:
    """What the files may not say, or say wrongly."""

    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json that states what args lack or have wrong"}
    )
    zarr_missing: str = field(
        default="fill",
        metadata={
            "help": "zarr chunks that are not there: the array's fill value (an error if it has none), or zero",
            "choices": ("fill", "zero"),
        },
    )
    vision_heads: int | None = field(
        default=None,
        metadata={"help": "attention heads of the vision tower, where neither args nor a config say them"},
    )


@dataclass(frozen=True, slots=True)
class McoreDistSave:
    """How tensors are filed, and for which versions."""

    backend: str = field(
        default=TORCH_DIST,
        metadata={
            "help": f"how tensors are stored; {ZARR} is for Megatron-Core up to 0.15",
            "choices": (TORCH_DIST, ZARR),
        },
    )
    layers: str | None = field(
        default=None,
        metadata={
            "help": "stacked: one tensor for a kind of weight in all layers; separate: one for each layer "
            "(default: as the source, else stacked where all layers are alike)",
            "choices": tuple(LAYERS),
        },
    )
    chunk: str = field(
        default="layer",
        metadata={
            "help": "layer: a chunk for each layer and expert; whole: one for each tensor",
            "choices": ("layer", "whole"),
        },
    )
    files: int | None = field(default=None, metadata={"help": "number of .distcp files (default: one for each 5 GB)"})
    run_config: bool = field(
        default=False, metadata={"help": "also write run_config.yaml, the model as Megatron-Bridge describes it"}
    )
    transformer_impl: str = field(
        default=TE,
        metadata={"help": "modules that load it: decides the _extra_state entries", "choices": (TE, LOCAL)},
    )
    mcore_version: str = field(
        default=show(NEWEST), metadata={"help": "oldest Megatron-Core that must load the files, 0.9 to 0.16"}
    )
    te_version: str = field(
        default=show(PORTABLE_TE),
        metadata={"help": "TransformerEngine that loads them: decides the kind of _extra_state"},
    )
    iteration: int | str | None = field(
        default=None, metadata={"help": "iteration to save as, or release (default: the source's; 1 from Hugging Face)"}
    )
    distributed_optimizer: bool | None = field(
        default=None,
        metadata={
            "help": "optimizer state as the distributed optimizer loads it, or the other (default: as the source)"
        },
    )
    vision_tp: int | None = field(
        default=None,
        metadata={
            "help": "tensor parallel size that will load an InternViT, whose heads need dummy ones for it (default: heads as in the source)"
        },
    )
    experts_apart: bool | None = field(
        default=None,
        metadata={
            "help": "experts have an optimizer of their own, as in runs with expert parallelism (default: as the source)"
        },
    )


class McoreDist:
    """Megatron-Core GPT models as `iter_XXXXXXX/*.distcp` with `.metadata`, `metadata.json` and `common.pt`."""

    name = "mcore-dist"
    summary = "Megatron-Core, distributed (--ckpt-format torch_dist, or zarr)"
    aliases: tuple[str, ...] = ("torch_dist", "torch-dist", "zarr")
    Load = McoreDistLoad
    Save = McoreDistSave
    trains = True

    def sniff(self, path: Path) -> bool:
        return path.is_dir() and looks_like(path, lambda folder: is_distributed(folder) and not is_plain(folder))

    def load(self, path: Path, options: McoreDistLoad, request: Request) -> Stored:
        return dist_loading.load(path, options.config, request, self.name, options.zarr_missing, options.vision_heads)

    def storage(self, path: Path, request: Request) -> dict[str, object]:
        folder = open_distributed(path, request.iteration).folder
        described = storage.zarr if dist_loading.backend(folder) == ZARR else storage.torch_dist
        return described(folder, (*MEGATRONS, DIGESTS, run_config.NAME))

    def target(self, checkpoint: Checkpoint, topology: Topology, options: McoreDistSave, request: Request) -> Target:
        config = checkpoint.config
        if config.kind == "vision":
            raise UsageError(
                "Megatron has no distributed checkpoints of a vision tower alone; combine it first, or use mcore"
            )
        if given := [name for name in DEGREES if topology.degree(name) != 1]:
            flags = ", ".join(f"--{name}" for name in given)
            raise TopologyError(
                f"a distributed checkpoint holds whole tensors, cut when Megatron loads it: no {flags} for it"
            )
        core, _ = _versions(options)
        if options.backend == ZARR and not core.has_zarr:
            raise UsageError(
                f"--saver.backend {ZARR}: Megatron-Core {show(core.version)} cannot load it; give --mcore-version 0.15 or older"
            )
        refuse_inexpressible(config, core, legacy=False)
        names = MULTIMODAL if config.towers else LAYERS
        mapping = chosen(names[_layers(checkpoint, options)], request.mappings)
        rows = saving.vocab_rows(config, topology, saving.divisor(checkpoint.extras, request))
        tower = "tower_local" if options.transformer_impl == LOCAL else "tower_te"
        variant = frozenset({"norm_apart", tower} if config.towers else {"norm_apart"})
        return Target(mapping, variant, even(config.layers), rows, heads=_heads(config, options))

    def save(self, stored: Stored, options: McoreDistSave, request: Request) -> Plan:
        filing = dist_saving.Filing(
            options.backend, options.files, options.chunk == "whole", options.run_config, options.experts_apart
        )
        return dist_saving.save(stored, options.iteration, request, _form(options), filing)

    def usage(self, stored: Stored, dst: str, options: McoreDistSave) -> str:
        return usage(stored, dst, _form(options))


def args_of(stored: Stored, options: McoreDistSave, request: Request) -> dict[str, object]:
    """The args that `common.pt` will hold."""
    return dict(dist_saving.written_args(stored, request, _form(options)).__dict__)


def _form(options: McoreDistSave) -> saving.Form:
    core, te = _versions(options)
    local = options.transformer_impl == LOCAL
    experts = "sequential" if local else "te-grouped"  # on disk they are the same
    extra = ExtraState(core, None if local else te, "sequential")
    return saving.Form(
        core,
        extra,
        local=local,
        experts=experts,
        ckpt_format=options.backend,
        distributed=options.distributed_optimizer,
    )


def _versions(options: McoreDistSave) -> tuple[Core, tuple[int, int]]:
    return Core(core_version(options.mcore_version)), te_version(options.te_version)


def _layers(checkpoint: Checkpoint, options: McoreDistSave) -> str:
    """How layers are filed: as asked for, else as in the source, else stacked where that can be."""
    mixed = _mixed(checkpoint.config)
    if options.layers == "stacked" and mixed:
        raise UsageError("--saver.layers stacked: the layers are not alike (some have experts); use separate")
    named = (*LAYERS.items(), *MULTIMODAL.items())
    source = next((name for name, mapping in named if checkpoint.origin.mapping == mapping), None)
    return options.layers or ("separate" if mixed else source or "stacked")


def _heads(config: ModelConfig, options: McoreDistSave) -> int | None:
    """The tower's heads for the tensor parallel size that will load it: its dummy heads are in the files."""
    return towers.padded_heads(config, options.vision_tp) if options.vision_tp is not None else None


def _mixed(config: ModelConfig) -> bool:
    return 0 < len(config.moe_layers) < config.layers
