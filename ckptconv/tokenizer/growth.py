"""Embeddings that grow with a tokenizer: a Hugging Face checkpoint with rows for the new tokens, as a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv import passes
from ckptconv.errors import UsageError
from ckptconv.formats import Request
from ckptconv.formats.hf import Hf, HfSave
from ckptconv.localize import localize
from ckptconv.mapping_files import load_mapping
from ckptconv.pipeline import Job, open_checkpoint
from ckptconv.plan import Check, Plan
from ckptconv.tokenizer.tokens import Extended
from ckptconv.topology import even


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
    if growth.init not in passes.FILLS:
        raise UsageError(f"--init {growth.init}: expected {', '.join(passes.FILLS)}")
    mapping = load_mapping(checkpoint.origin.mapping)
    grown = passes.grow_vocabulary(checkpoint, growth.rows, passes.FILLS[growth.init], mapping)
    saver, options = Hf(), HfSave()
    target = saver.target(grown, even(config.layers), options, Request())
    plan = saver.save(localize(grown, target, saver.name), options, Request())
    facts = {"rows": growth.rows, "rows_before": config.vocab_rows, "true_before": true, "init": growth.init}
    about = {**plan.about, "family": config.family, "vocabulary": facts}
    checks = tuple(Check(*replica) for replica in checkpoint.replicas)
    notes = (*grown.extras.notes, *_notes(extended, true))
    return replace(plan, checks=checks, about=about, root=str(growth.checkpoint)), notes


def _notes(extended: Extended, true: int) -> list[str]:
    first = min(extended.ids.values())
    if true > first:
        kept = f"the checkpoint has rows up to {true - 1} already: those from {first} on stay as they are"
        return [f"{kept} (--vocab-size {first} says that they are padding, and makes them anew)"]
    if true < first:
        return [f"the checkpoint had no rows for ids {true} to {first - 1}, whose tokens are not new: it gets them too"]
    return []
