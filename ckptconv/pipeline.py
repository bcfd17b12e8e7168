"""The pipeline: load, canonicalize, passes, localize, save, execute. Every command is this, or stops it earlier."""

from __future__ import annotations

import os
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ckptconv import passes, tower_passes
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Origin, Stored
from ckptconv.collecting import no_collecting
from ckptconv.errors import PlanError, UsageError
from ckptconv.executor.execute import ExecuteOptions, Progress, Report, execute
from ckptconv.executor.manifest_check import check_manifest
from ckptconv.formats import Format, Request, Training
from ckptconv.layout import Layout, layout_from
from ckptconv.localize import localize
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen, load_mapping_file
from ckptconv.plan import Check, Plan
from ckptconv.registry import get_format, make_options, sniff

VERSION = "0.1.0"
TOKENIZER = "tokenizer"  # an option of formats that hold or need one
Options = Dict[str, object]


@dataclass(frozen=True, slots=True)
class Job:
    """One conversion as asked for. `saver` None means: the source's own format (reshard)."""

    source: Path
    loader: str | None = None
    saver: str | None = None
    layout: Layout = field(default_factory=Layout)
    loader_options: Options = field(default_factory=dict)
    saver_options: Options = field(default_factory=dict)
    dtype: str = "keep"
    vocab_size: int | None = None
    vocab_divisor: int | None = None
    family: str | None = None
    mapping: tuple[Path, ...] = ()
    drop: tuple[str, ...] = ()
    optimizer: str = "keep"
    replicas: str = "check"
    iteration: int | str | None = None
    check: bool = False
    tokenizer: Path | None = None

    def request(self) -> Request:
        return Request(
            vocab=self.vocab_size,
            vocab_divisor=self.vocab_divisor,
            family=self.family,
            iteration=self.iteration,
            check=self.check,
            mappings=tuple(load_mapping_file(path) for path in self.mapping),
            drop=self.drop,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversion worked out to the last byte, before any tensor is read."""

    plan: Plan
    stored: Stored
    checkpoint: Checkpoint
    saver: Format
    options: object

    def usage(self, dst: str) -> str:
        return self.saver.usage(self.stored, dst, self.options)


def load_stored(source: Path, loader: str | None, options: Options, request: Request) -> tuple[Format, Stored]:
    fmt = get_format(loader) if loader and loader != "auto" else sniff(source)
    given = _with_tokenizer(options, fmt.Load, request)
    stored = fmt.load(source, make_options(fmt.Load, given, "loader", fmt.name), request)
    if request.check and (notes := check_manifest(source, stored)):
        stored = replace(stored, extras=replace(stored.extras, notes=(*stored.extras.notes, *notes)))
    return fmt, stored


def load(
    path: str | os.PathLike[str], *, loader: str | None = None, loader_options: Options | None = None, **wishes: Any
) -> Checkpoint:
    """A checkpoint as its canonical graph of lazy tensors; `wishes` are the fields of Job, such as vocab_size."""
    job = Job(Path(path), loader=loader, loader_options=loader_options or {}, **wishes)
    return open_checkpoint(job)[1]


@no_collecting()
def open_checkpoint(job: Job, *, training: bool = False) -> tuple[Format, Checkpoint]:
    """`training`: with optimizer state, where it can be read; else it is only told."""
    request = replace(job.request(), training=training)
    fmt, stored = load_stored(job.source, job.loader, job.loader_options, request)
    job.layout.check_source(stored.topology)
    return fmt, passes.with_vocabulary(canonicalize(stored, job.drop), job.vocab_size)


@no_collecting()
def prepare(job: Job) -> Prepared:
    """Everything but moving bytes: the plan, or the error that says why there is none."""
    loader, checkpoint = open_checkpoint(job, training=_takes_training(job))
    return prepare_from(job, loader, checkpoint, str(job.source))


@no_collecting()
def prepare_from(job: Job, loader: Format, checkpoint: Checkpoint, root: str) -> Prepared:
    """The same for a checkpoint that is open already; sources are told relative to `root`."""
    request = job.request()
    saver = loader if job.saver is None else get_format(job.saver)
    passes.refuse_whole_numbers(checkpoint)
    checkpoint = _without_state(checkpoint, job.optimizer, saver.name)
    _refuse_other_iteration(checkpoint, job.iteration)
    _refuse_idle_tokenizer(job.tokenizer, loader, saver)
    options = make_options(saver.Save, _with_tokenizer(job.saver_options, saver.Save, request), "saver", saver.name)
    checkpoint = passes.cast(checkpoint, job.dtype, _mapping_of(checkpoint, request))
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, dtype=passes.mean_dtype(checkpoint)))
    topology = job.layout.topology(checkpoint.config.layers, checkpoint.origin.topology, keep=job.saver is None)
    target = saver.target(checkpoint, topology, options, request)
    if target.donor is not None:
        target = replace(target, donor=passes.cast(target.donor, job.dtype, target.mapping))
    checkpoint = tower_passes.put_back(checkpoint, target, _mapping_of(checkpoint, request))
    checkpoint = tower_passes.resize_heads(checkpoint, target.heads, target.mapping)
    checkpoint = passes.resize_vocabulary(checkpoint, target.vocab_rows, target.mapping, target.vocab_fill)
    _refuse_unused(request.mappings, (checkpoint.origin.mapping, target.mapping.name))
    stored = localize(checkpoint, target, saver.name)
    plan = saver.save(stored, options, request)
    checks = () if job.replicas == "first" else tuple(Check(*replica) for replica in checkpoint.replicas)
    about = {**plan.about, **_about(job, checkpoint, stored, options)}
    plan = replace(plan, checks=checks, about=about, root=root, scratch=checkpoint.extras.scratch)
    return Prepared(plan, stored, checkpoint, saver, options)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    saver: str | None = None,
    loader: str | None = None,
    tp: int | str | None = None,
    pp: int | str | None = None,
    vpp: int | str | None = None,
    ep: int | str | None = None,
    etp: int | str | None = None,
    pp_layers: Sequence[int] | str | None = None,
    loader_options: Options | None = None,
    saver_options: Options | None = None,
    execute_options: ExecuteOptions | None = None,
    progress: Progress | None = None,
    **wishes: Any,
) -> Report:
    """Convert SRC to DST; `saver` None keeps the format. `wishes` are the remaining fields of Job (dtype, vocab_size, ...)."""
    counts = pp_layers if isinstance(pp_layers, str) or pp_layers is None else ",".join(map(str, pp_layers))
    job = Job(
        Path(src),
        loader=loader,
        saver=saver,
        layout=layout_from({"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp}, counts),
        loader_options=loader_options or {},
        saver_options=saver_options or {},
        **wishes,
    )
    check_places(job.source, Path(dst))
    return execute(prepare(job).plan, Path(dst), execute_options or ExecuteOptions(), progress)


def check_places(src: Path, dst: Path) -> None:
    """Source and destination, folders or files, must not be the same, nor one inside the other."""
    a, b = src.resolve(), dst.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise UsageError(f"source {src} and destination {dst} are the same or one lies inside the other")


def _with_tokenizer(options: Options, kind: type, request: Request) -> Options:
    """A tokenizer given for the model goes to every side that takes one."""
    taken = request.tokenizer is not None and _takes_tokenizer(kind)
    return {TOKENIZER: request.tokenizer, **options} if taken else options


def _takes_tokenizer(kind: type) -> bool:
    return any(option.name == TOKENIZER for option in fields(kind))


def _refuse_idle_tokenizer(tokenizer: Path | None, loader: Format, saver: Format) -> None:
    if tokenizer is not None and not (_takes_tokenizer(loader.Load) or _takes_tokenizer(saver.Save)):
        raise UsageError(
            f"--tokenizer {tokenizer}: neither {loader.name} as a source nor {saver.name} as a result takes one"
        )


def _mapping_of(checkpoint: Checkpoint, request: Request) -> Mapping:
    return chosen(checkpoint.origin.mapping, request.mappings)


def _takes_training(job: Job) -> bool:
    """Whether training state is wanted and has a place; where a format keeps its own, what it reads it also writes."""
    if job.optimizer not in ("keep", "drop"):
        raise UsageError(f"--optimizer {job.optimizer}: expected keep or drop")
    return job.optimizer == "keep" and (job.saver is None or isinstance(get_format(job.saver), Training))


def _without_state(checkpoint: Checkpoint, optimizer: str, saver: str) -> Checkpoint:
    """Training state that is not taken along is given up on purpose only, and then named in the manifest."""
    state = checkpoint.extras.state
    if state and optimizer == "keep":
        listed = "".join(f"\n  {item}" for item in state)
        raise PlanError(
            f"the source holds training state, which {saver} files of ours cannot carry over:{listed}\n"
            "Give --optimizer drop to convert the weights alone and lose it."
        )
    if not state:
        return checkpoint
    notes = (*checkpoint.extras.notes, f"given up (--optimizer drop): {', '.join(state)}")
    return replace(checkpoint, extras=replace(checkpoint.extras, notes=notes))


def _refuse_other_iteration(checkpoint: Checkpoint, wanted: int | str | None) -> None:
    """A source without iterations, or a folder of one alone, has none to choose from."""
    step = checkpoint.extras.step
    if wanted is not None and str(wanted) != str(step):
        has = "no iterations" if step is None else f"iteration {step} alone"
        raise UsageError(f"--iteration {wanted}: the source ({checkpoint.origin.format}) has {has}")


def _refuse_unused(given: Sequence[Mapping], names: Sequence[str]) -> None:
    """A mapping that the user gives and nothing uses is a mistake, in it or in what it extends."""
    for mapping in given:
        if mapping.name not in names:
            raise UsageError(
                f"--mapping {mapping.name} extends {mapping.extends}, which this conversion does not use: it uses {' and '.join(names)}"
            )


def _about(job: Job, checkpoint: Checkpoint, stored: Stored, options: object) -> dict[str, object]:
    """The head of the manifest: what was asked, of what, and what was left out. No time, host, user or absolute path."""
    asked = {
        "dtype": job.dtype,
        "vocab_size": checkpoint.config.vocab,
        "family": checkpoint.config.family,
        "saver_options": _chosen_options(options, job.saver_options),
        "drop": list(job.drop),
        "optimizer": job.optimizer,
        "replicas": job.replicas,
    }
    unchecked = [f"{r.name}: {r.where}" for r in checkpoint.replicas] if job.replicas == "first" else []
    return {
        "ckptconv": VERSION,
        "source": _form(checkpoint.origin),
        "result": _form(Origin(stored.format, stored.mapping.name, stored.variant, stored.topology)),
        "options": asked,
        "dropped": list(checkpoint.dropped),
        "unchecked_replicas": unchecked,
        "notes": list(stored.extras.notes),
    }


def _chosen_options(options: Any, given: Options) -> dict[str, str]:
    """The options given, as the format read them; paths are those of one machine and left out."""
    names = sorted({key.replace("_", "-") for key in given})
    values = [(name, getattr(options, name.replace("-", "_"))) for name in names]
    return {name: str(value) for name, value in values if not isinstance(value, Path)}


def _form(origin: Origin) -> dict[str, object]:
    t = origin.topology
    degrees = {name: t.degree(name) for name in ("tp", "pp", "vpp", "ep", "etp")}
    counts = [len(stage.layers) for stage in t.stages]
    return {
        "format": origin.format,
        "mapping": origin.mapping,
        "form": sorted(origin.variant),
        **degrees,
        "pp_layers": counts,
    }
