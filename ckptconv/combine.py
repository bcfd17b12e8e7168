"""Combine, swap and extract: the parts of multimodal models, opened from any formats and written as any other conversion."""

from __future__ import annotations

import os
from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv import passes
from ckptconv.checkpoint import Checkpoint
from ckptconv.coding import literal
from ckptconv.config import ModelConfig
from ckptconv.dtypes import FP32
from ckptconv.errors import ConfigError, UsageError
from ckptconv.formats import Format
from ckptconv.huggingface.family_config import config_text, is_family, write_config
from ckptconv.huggingface.sections import of_parts, own_code, write
from ckptconv.huggingface.sight import read_sight
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen, families_of_parts, family_names, load_mapping
from ckptconv.parts import CONFIG, LANGUAGE, PARTS, combine, extract, left_behind, parts_of, swap
from ckptconv.pipeline import Job, Prepared, open_checkpoint, prepare_from
from ckptconv.projectors import KINDS, check_kind, kind_named, new_projector

NO_CONFIG = "no config.json travels along of"


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
    model = _noted(combine(language, tower, between), _joined(kind, language, tower, between, init_projector))
    sources = [job, vision, *([projector] if projector else [])]
    return prepare_from(_of_kind(job, kind, model), loader, _with_config(model, kind, job), _common(sources))


def prepare_swap(
    job: Job, other: Job, part: str, *, kind: str | None = None, dtypes: Dict[str, str] | None = None
) -> Prepared:
    """The plan of a model (`job`) with one part from another checkpoint."""
    if part not in PARTS:
        raise UsageError(f"--replace {part}: expected one of {', '.join(PARTS)}")
    if idle := [name for name, dtype in (dtypes or {}).items() if name != part and dtype != "keep"]:
        raise UsageError(
            f"--{idle[0]}.dtype beside --replace {part}: only the new part is cast; --dtype casts all of them"
        )
    loader, model = open_checkpoint(job)
    model = swap(model, part, _open(other, part, dtypes or {})[1])
    families = families_of_parts(model.config.family)
    if job.saver == "hf" and not (families or kind or "family" in job.saver_options):
        raise UsageError(f"--replace {part}: the new one is of another family; --as says what kind of model it makes")
    if families and kind is None:
        model = _described(model, load_mapping(model.config.family), job)
    return prepare_from(_of_kind(job, kind, model), loader, _with_config(model, kind, job), _common([job, other]))


def prepare_extract(job: Job, part: str) -> Prepared:
    """The plan of one part of a model as a checkpoint of its own."""
    loader, model = open_checkpoint(job)
    taken = extract(model, part)
    for note in left_behind(model.extras.files, taken.extras.files, "the whole model's folder"):
        taken = _noted(taken, note)
    if taken is not model and taken.config.family in _families(job):
        taken = _described(taken, load_mapping(taken.config.family), job)
    return prepare_from(job, loader, taken, str(job.source))


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
    """The model as one of its kind's family at Hugging Face."""
    family = _family(name, model) if name else None
    if family is None:
        return model
    if model.config.family not in _families(job) and not families_of_parts(model.config.family):
        return _noted(
            model, f"{NO_CONFIG} {family}: which family the language model is of is not known (--family says it)"
        )
    return _described(model, of_parts(load_mapping(family), model.config), job)


def _families(job: Job) -> set[str]:
    return {*family_names(), *(mapping.name for mapping in job.request().mappings)}


def _described(model: Checkpoint, mapping: Mapping, job: Job) -> Checkpoint:
    """What it is at Hugging Face and its config.json, which formats of others keep beside their files."""
    if job.saver == "hf":  # which writes it itself
        return model
    config = model.config
    true = _without_padding(config)
    base = config.raw if is_family(config.raw, mapping) else None
    complete = not mapping.parts or "projector" in config.towers
    try:
        table = write_config(true, base, mapping)[0] if complete else write(true, base, mapping, write_config)
    except ConfigError as error:
        kept = {name: source for name, source in model.extras.files.items() if name != CONFIG or base is None}
        model = replace(model, extras=replace(model.extras, files=kept))  # one of before would say what is no longer so
        return _noted(model, f"{NO_CONFIG} {mapping.name}: {str(error).splitlines()[0]}")
    files = {**model.extras.files, CONFIG: literal(config_text(table))}
    seen = read_sight(table, CONFIG, mapping) if mapping.parts else {}
    described = replace(config, family=mapping.name, raw=table, **seen)
    return replace(model, config=described, extras=replace(model.extras, files=files))


def _without_padding(config: ModelConfig) -> ModelConfig:
    """With the words and, in its tower, the attention heads that config.json counts."""
    towers = dict(config.towers)
    if (tower := towers.get("vision")) is not None:
        heads = tower.true_heads or tower.heads
        towers["vision"] = replace(tower, heads=heads, kv_heads=heads, true_heads=None)
    return replace(config, vocab_rows=config.vocab or config.vocab_rows, towers=towers)


def _joined(
    kind: str | None, language: Checkpoint, tower: Checkpoint, between: Checkpoint | None, how: str | None
) -> str:
    """What the model was made of, for the manifest."""
    parts = [f"{part.config.family} ({part.origin.format})" for part in (language, tower)]
    projector = f"new, {how}" if how else between.origin.format if between else "none"
    return f"joined{f' as {kind}' if kind else ''}: {parts[0]}, {parts[1]}, projector ({projector})"


def _noted(model: Checkpoint, note: str) -> Checkpoint:
    return replace(model, extras=replace(model.extras, notes=(*model.extras.notes, note)))


def _common(jobs: list[Job]) -> str:
    """The folder that all sources lie in."""
    return os.path.commonpath([os.path.abspath(job.source) for job in jobs])
