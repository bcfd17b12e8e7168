"""Combine, swap and extract: the parts of multimodal models, opened from any formats and written as any other conversion."""

from __future__ import annotations

import os
from collections.abc import Mapping as Dict

from ckptconv import passes
from ckptconv.checkpoint import Checkpoint
from ckptconv.errors import ConfigError, UsageError
from ckptconv.formats import Format
from ckptconv.mapping_files import chosen
from ckptconv.parts import LANGUAGE, PARTS, combine, extract, parts_of, swap
from ckptconv.pipeline import Job, Prepared, open_checkpoint, prepare_from

# how each kind of model feeds its projector: with a patch's entries, or with those of four (pixel shuffle)
KINDS = {"llava": 1, "neva": 1, "nvlm": 4, "internvl": 4}


def prepare_combine(
    job: Job,
    vision: Job,
    projector: Job | None = None,
    *,
    kind: str | None = None,
    dtypes: Dict[str, str] | None = None,
) -> Prepared:
    """The plan of a model made of a language model (`job`, which says what is to be written), a vision tower and a projector."""
    jobs = {LANGUAGE: job, "vision": vision} | ({"projector": projector} if projector else {})
    opened = {part: _open(its, part, (dtypes or {}).get(part, "keep")) for part, its in jobs.items()}
    loader, language = opened[LANGUAGE]
    model = combine(language, opened["vision"][1], opened["projector"][1] if projector else None)
    _check_kind(model, kind)
    return prepare_from(job, loader, model, _common([str(its.source) for its in jobs.values()]))


def prepare_swap(job: Job, other: Job, part: str, *, dtypes: Dict[str, str] | None = None) -> Prepared:
    """The plan of a model (`job`) with one part from another checkpoint."""
    if part not in PARTS:
        raise UsageError(f"--replace {part}: expected one of {', '.join(PARTS)}")
    loader, model = open_checkpoint(job)
    new = _open(other, part, (dtypes or {}).get(part, "keep"))[1]
    return prepare_from(job, loader, swap(model, part, new), _common([str(job.source), str(other.source)]))


def prepare_extract(job: Job, part: str) -> Prepared:
    """The plan of one part of a model as a checkpoint of its own."""
    loader, model = open_checkpoint(job)
    return prepare_from(job, loader, extract(model, part), str(job.source))


def _open(job: Job, part: str, dtype: str) -> tuple[Format, Checkpoint]:
    """A part from a checkpoint of its own, or a projector out of a whole model."""
    loader, checkpoint = open_checkpoint(job)
    if part == "projector" and parts_of(checkpoint) != (part,):
        checkpoint = extract(checkpoint, part)
    return loader, passes.cast(checkpoint, dtype, chosen(checkpoint.origin.mapping, job.request().mappings))


def _check_kind(model: Checkpoint, kind: str | None) -> None:
    """What --as says must be what the projector takes."""
    if kind is None:
        return
    if kind not in KINDS:
        raise UsageError(f"--as {kind}: expected one of {', '.join(KINDS)}")
    vision, projector = model.config.towers["vision"], model.config.towers.get("projector")
    if projector is not None and projector.inputs != KINDS[kind] * vision.hidden:
        raise ConfigError(
            f"--as {kind}: its projector takes {KINDS[kind]} x {vision.hidden} entries of the vision tower, "
            f"but this one takes {projector.inputs}"
        )


def _common(sources: list[str]) -> str:
    """The folder that all sources lie in."""
    return os.path.commonpath([os.path.abspath(source) for source in sources])
