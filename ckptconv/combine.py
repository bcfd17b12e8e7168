"""Combine, swap and extract: the parts of multimodal models, opened from any formats and written as any other conversion."""

from __future__ import annotations

import os
from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv import passes
from ckptconv.checkpoint import Checkpoint
from ckptconv.coding import literal
from ckptconv.dtypes import FP32
from ckptconv.errors import ConfigError, UsageError
from ckptconv.formats import Format
from ckptconv.huggingface.family_config import config_text, write_config
from ckptconv.huggingface.sections import of_parts, own_code, write
from ckptconv.mapping_files import chosen, family_names, load_mapping
from ckptconv.parts import CONFIG, LANGUAGE, PARTS, combine, extract, parts_of, swap
from ckptconv.pipeline import Job, Prepared, open_checkpoint, prepare_from
from ckptconv.projectors import KINDS, check_kind, kind_named, new_projector


def prepare_combine(
    job: Job,
    vision: Job,
    projector: Job | None = None,
    *,
    kind: str | None = None,
    dtypes: Dict[str, str] | None = None,
    init_projector: str | None = None,
    vocab_rows: int | None = None,
    init: str = "mean",
) -> Prepared:
    """The plan of a model made of a language model (`job`, which says what is to be written), a vision tower and a projector.

    `init_projector` makes a new projector; `vocab_rows` gives the language model rows for new tokens, which `init` fills.
    """
    if projector is not None and init_projector is not None:
        raise UsageError("--projector and --init-projector: a projector comes from a checkpoint, or is a new one")
    said = dtypes or {}
    loader, language = _open(job, LANGUAGE, said)
    if vocab_rows is not None:
        language = _grown(language, vocab_rows, init, job)
    tower = _open(vision, "vision", said)[1]
    between = _open(projector, "projector", said)[1] if projector else None
    if init_projector is not None:
        dtype = passes.mean_dtype(language) or FP32
        between = _cast(
            new_projector(init_projector, kind, tower.config, language.config, dtype), "projector", said, job
        )
    model = combine(language, tower, between)
    sources = [job, vision, *([projector] if projector else [])]
    return prepare_from(_of_kind(job, kind, model), loader, _with_config(model, kind, job), _common(sources))


def prepare_swap(
    job: Job, other: Job, part: str, *, kind: str | None = None, dtypes: Dict[str, str] | None = None
) -> Prepared:
    """The plan of a model (`job`) with one part from another checkpoint."""
    if part not in PARTS:
        raise UsageError(f"--replace {part}: expected one of {', '.join(PARTS)}")
    loader, model = open_checkpoint(job)
    model = swap(model, part, _open(other, part, dtypes or {})[1])
    return prepare_from(_of_kind(job, kind, model), loader, model, _common([job, other]))


def prepare_extract(job: Job, part: str) -> Prepared:
    """The plan of one part of a model as a checkpoint of its own."""
    loader, model = open_checkpoint(job)
    return prepare_from(job, loader, extract(model, part), str(job.source))


def _open(job: Job, part: str, dtypes: Dict[str, str]) -> tuple[Format, Checkpoint]:
    """A part from a checkpoint of its own, or a projector out of a whole model."""
    loader, checkpoint = open_checkpoint(job)
    if part == "projector" and parts_of(checkpoint) != (part,):
        checkpoint = extract(checkpoint, part)
    return loader, _cast(checkpoint, part, dtypes, job)


def _cast(checkpoint: Checkpoint, part: str, dtypes: Dict[str, str], job: Job) -> Checkpoint:
    mapping = chosen(checkpoint.origin.mapping, job.request().mappings)
    return passes.cast(checkpoint, dtypes.get(part, "keep"), mapping)


def _grown(language: Checkpoint, rows: int, init: str, job: Job) -> Checkpoint:
    if init not in passes.FILLS:
        raise UsageError(f"--init {init}: expected {', '.join(passes.FILLS)}")
    mapping = chosen(language.origin.mapping, job.request().mappings)
    return passes.grow_vocabulary(language, rows, passes.FILLS[init], mapping)


def _of_kind(job: Job, name: str | None, model: Checkpoint) -> Job:
    """The model held against its kind, which also says the family of a Hugging Face folder."""
    if name is None:
        return job
    check_kind(model.config, name)
    if job.saver != "hf" or "family" in job.saver_options:
        return job
    family = _family(name, model)
    if family is None:
        known = ", ".join(other for other, kind in KINDS.items() if kind.family)
        raise UsageError(f"--as {name}: Hugging Face has no such family; it has {known}")
    return replace(job, saver_options={**job.saver_options, "family": family})


def _family(name: str, model: Checkpoint) -> str | None:
    """The kind's family at Hugging Face, which the family of the language model may decide."""
    kind, language = kind_named(name), model.config.family
    if kind.own_code is not None and language in family_names() and own_code(load_mapping(language)):
        return kind.own_code
    return kind.family


def _with_config(model: Checkpoint, name: str | None, job: Job) -> Checkpoint:
    """The model with the config.json of its kind at Hugging Face, which formats of others keep beside their files."""
    family = _family(name, model) if name else None
    known = {*family_names(), *(mapping.name for mapping in job.request().mappings)}
    if family is None or job.saver == "hf" or model.config.family not in known:
        return model
    mapping = of_parts(load_mapping(family), model.config)
    extras = model.extras
    try:
        text = config_text(write(model.config, None, mapping, write_config))
    except ConfigError as error:
        note = f"no config.json of {family} travels along: {str(error).splitlines()[0]}"
        return replace(model, extras=replace(extras, notes=(*extras.notes, note)))
    return replace(model, extras=replace(extras, files={**extras.files, CONFIG: literal(text)}))


def _common(jobs: list[Job]) -> str:
    """The folder that all sources lie in."""
    return os.path.commonpath([os.path.abspath(job.source) for job in jobs])
