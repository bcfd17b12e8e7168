"""Shorthands of these tests: a run's checkpoint converted for another run, and the slots a checkpoint has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ckptconv
from ckptconv.checkpoint import Key, Stored
from ckptconv.formats import Request
from ckptconv.pipeline import load_stored
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
