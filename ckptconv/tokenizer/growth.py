"""Embeddings that grow with a tokenizer: a Hugging Face checkpoint with rows for the new tokens, as a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ckptconv import passes
from ckptconv.checkpoint import Key
from ckptconv.errors import ConfigError, UsageError, ValueLossError
from ckptconv.formats import Request
from ckptconv.formats.hf import Hf, HfSave
from ckptconv.localize import localize
from ckptconv.mapping_files import load_mapping
from ckptconv.nodes import Fill, concat
from ckptconv.pipeline import Job, open_checkpoint
from ckptconv.plan import Check, Plan
from ckptconv.tensor import Tensor
from ckptconv.tokenizer.tokens import Extended
from ckptconv.topology import even
from ckptconv.values import Array

INITS = ("mean", "zero", "last")
CHUNK = 1 << 22  # bytes read at once for a mean


@dataclass(frozen=True, slots=True)
class Growth:
    """`rows` in all, for the vocabulary of a Hugging Face folder; `vocab` says how many of those it has are real."""

    checkpoint: Path
    rows: int
    init: str = "mean"
    vocab: int | None = None


def plan_growth(growth: Growth, extended: Extended) -> tuple[Plan, tuple[str, ...]]:
    """The grown checkpoint, and what to know about its rows. A mean is worked out here; all else reads headers only."""
    if growth.rows < extended.size:
        raise UsageError(f"--vocab-rows {growth.rows}: the tokenizer has {extended.size} tokens now")
    _, checkpoint = open_checkpoint(Job(growth.checkpoint, loader=Hf.name, vocab_size=growth.vocab))
    config = checkpoint.config
    true = config.vocab_rows if config.vocab is None else config.vocab
    if growth.rows < true:
        raise UsageError(f"--vocab-rows {growth.rows}: the checkpoint has {true} rows; none may be lost")
    mapping = load_mapping(checkpoint.origin.mapping)
    grown = passes.grow_vocabulary(checkpoint, growth.rows, row_maker(growth.init), mapping)
    saver, options = Hf(), HfSave()
    target = saver.target(grown, even(config.layers), options, Request())
    plan = saver.save(localize(grown, target, saver.name), options, Request())
    facts = {"rows": growth.rows, "rows_before": config.vocab_rows, "true_before": true, "init": growth.init}
    about = {**plan.about, "family": config.family, "vocabulary": facts}
    checks = tuple(Check(*replica) for replica in checkpoint.replicas)
    notes = (*grown.extras.notes, *_notes(extended, true))
    return replace(plan, checks=checks, about=about, root=str(growth.checkpoint)), notes


def row_maker(init: str) -> passes.RowOf:
    """The row that new ones repeat. That of a mean is made of constants: it is known before anything is written."""
    if init not in INITS:
        raise UsageError(f"--init {init}: expected {', '.join(INITS)}")
    if init != "mean":
        return passes.zero_row if init == "zero" else passes.last_row
    return lambda key, kept, axis: constant_row(mean(key, kept, axis), kept, axis)


def mean(key: Key, kept: Tensor, axis: int) -> Array:
    """The mean along one axis, which keeps size 1: summed in fp64, in order, a stretch of rows at a time."""
    if not kept.dtype.is_float:
        raise ConfigError(f"{key} is {kept.dtype}: there is no mean of such values; give --init zero or last")
    size = kept.shape[axis]
    step = max(1, CHUNK * size // max(kept.nbytes, 1))
    total = np.zeros((), np.float64)
    for start in range(0, size, step):
        values = kept.narrow(axis, start, min(start + step, size)).numpy()
        total = total + values.astype(np.float64).sum(axis, keepdims=True)
    result = (total / size).astype(kept.dtype.numpy)
    if not np.isfinite(result.astype(np.float64)).all():
        raise ValueLossError(f"{key}: the mean of its rows is not finite: there are infinities or NaN in it")
    return result


def constant_row(values: Array, like: Tensor, axis: int) -> Tensor:
    """Values as a lazy tensor: one constant after the other."""
    bits = np.ascontiguousarray(values).view(f"u{like.dtype.itemsize}")
    if bits.ndim == 1:
        return Fill((1,), like.dtype, int(bits[0]))
    along = 1 - axis
    ones = (1,) * bits.ndim
    return concat([Fill(ones, like.dtype, int(bit)) for bit in bits.reshape(-1)], along)


def _notes(extended: Extended, true: int) -> list[str]:
    first = min(extended.ids.values())
    if true > first:
        kept = f"the checkpoint has rows up to {true - 1} already: those from {first} on stay as they are"
        return [f"{kept} (--vocab-size {first} says that they are padding, and makes them anew)"]
    if true < first:
        return [f"the checkpoint had no rows for ids {true} to {first - 1}, whose tokens are not new: it gets them too"]
    return []
