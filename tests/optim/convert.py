"""Shorthands of these tests: a run's checkpoint converted for another run, and the slots a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptconv
from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, Checkpoint, Key, Stored, TrainingState
from ckptconv.executor.execute import execute
from ckptconv.formats import Request
from ckptconv.pipeline import Job, load_stored, open_checkpoint, prepare_from
from tests.judge.optim import Run
from tests.judge.ranks import Layout
from tests.optim.conftest import Trained

Array = NDArray[Any]


def moved(there: Trained, run: Run, out: Path, source: Path | None = None, **wishes: Any) -> Path:
    """The checkpoint of one run (its rank files, or `source`) as another run of the same model wants it."""
    layout = run.layout
    options: dict[str, Any] = {"distributed_optimizer": run.distributed, "transformer_impl": "local"}
    if there.run.config["model_type"] == "mixtral":
        options["experts"] = "sequential"
    degrees = {
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp or 1,
        "ep": layout.ep,
        "etp": layout.etp or layout.tp,
    }
    return converted(source or there.folder, out, **degrees, vocab_divisor=run.divisor, saver_options=options, **wishes)


def converted(source: Path, out: Path, **wishes: Any) -> Path:
    """Without waiting for the disk."""
    ckptconv.convert(source, out, execute_options=ckptconv.ExecuteOptions(durable=False), **wishes)
    return out


def in_training(source: Path, args: dict[str, object], out: Path, **wishes: Any) -> Path:
    """A model of fp32 as if a run with these args had saved it after 2 updates, with moments that are copies of the weights."""

    def state(whole: Checkpoint) -> Checkpoint:
        slots = {Key(key.name, slot): weight for key, weight in whole.tensors.items() for slot in (EXP_AVG, EXP_AVG_SQ)}
        training = TrainingState(({"wd_mult": 1.0}, {"wd_mult": 0.0}), updates=2)
        extras = replace(whole.extras, objects={**whole.extras.objects, "args": args}, training=training)
        return replace(whole, tensors={**whole.tensors, **slots}, extras=extras)

    return edited(source, state, out, **wishes)


def edited(source: Path, edit: Callable[[Checkpoint], Checkpoint], out: Path, **wishes: Any) -> Path:
    """Converted with an edit of the canonical graph on the way."""
    job = Job(source, **wishes)
    loader, whole = open_checkpoint(job, training=True)
    plan = prepare_from(job, loader, edit(whole), str(source)).plan
    execute(plan, out, ckptconv.ExecuteOptions(durable=False))
    return out


def at(there: Trained, layout: Layout, *, distributed: bool | None = None, bf16: bool | None = None) -> Run:
    """The same run at another layout."""
    run = there.run
    return Run(
        run.hf,
        layout,
        run.bf16 if bf16 is None else bf16,
        run.distributed if distributed is None else distributed,
        run.rows,
    )


def stored(folder: Path) -> Stored:
    return load_stored(folder, None, {}, Request(training=True))[1]


def slots(folder: Path) -> dict[str, dict[Key, Array]]:
    """Every tensor of every rank that is no weight, by the rank's place."""
    held = stored(folder)
    return {
        held.places[rank]: {key: np.asarray(t.numpy()) for key, t in tensors.items() if key.slot != "param"}
        for rank, tensors in held.ranks.items()
    }
