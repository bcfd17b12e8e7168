"""What Lightning saves beside a model, in a .ckpt or in `common.pt`: told in words, none of it silently left out."""

from __future__ import annotations

import re
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from pathlib import Path

from ckptconv.errors import FormatError

WEIGHTS, HYPER = "state_dict", "hyper_parameters"
_MODEL = (
    WEIGHTS,
    HYPER,
    "hparams_name",
    "hparams_type",
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "content_metadata",
)
_RUN = {  # key -> what a user calls it
    "optimizer_states": "optimizer",
    "optimizer": "optimizer",
    "lr_schedulers": "learning rate scheduler",
    "loops": "progress of the loops",
    "callbacks": "callbacks",
}
MARKER = "-unfinished"
_CHUNK = re.compile(r"model_?(\d{1,3})")


@dataclass(frozen=True, slots=True)
class RunState:
    """`step` the run has reached; `state` is what would be needed to go on, `strays` what is not known."""

    step: int | None
    state: tuple[str, ...]
    strays: tuple[str, ...]


def run_state(saved: Dict[object, object], where: object) -> RunState:
    """A checkpoint's dictionary, the model's part aside."""
    step = saved.get("global_step")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise FormatError(where, f"global_step is {step!r}, expected a number")
    state = dict.fromkeys(word for key, word in _RUN.items() if saved.get(key))
    known = {*_MODEL, *_RUN, *chunk_keys(saved)}
    strays = sorted(str(key)[:60] for key in saved if key not in known)
    return RunState(step, tuple(state), tuple(strays))


def chunk_keys(saved: Dict[object, object]) -> list[str]:
    """`model0`, `model1`, … of an interleaved pipeline (`model_0` of a distributed one), in order."""
    found = [(int(match[1]), key) for key in saved if isinstance(key, str) and (match := _CHUNK.fullmatch(key))]
    return [key for _, key in sorted(found)]


def refuse_unfinished(path: Path) -> None:
    """NeMo puts a marker beside a checkpoint while it is being saved."""
    marker = path.with_name(path.name.removesuffix(".ckpt") + MARKER)
    if marker.exists():
        raise FormatError(path, f"was not saved to its end: {marker.name} lies beside it; take another checkpoint")
