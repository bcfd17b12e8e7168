"""What Lightning saves beside a model, in a .ckpt or in `common.pt`: told in words, none of it silently left out."""

from __future__ import annotations

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
    strays = sorted(str(key)[:60] for key in saved if key not in _MODEL and key not in _RUN)
    return RunState(step, tuple(state), tuple(strays))


def refuse_unfinished(path: Path) -> None:
    """NeMo puts a marker beside a checkpoint while it is being saved."""
    marker = path.with_name(path.name.removesuffix(".ckpt") + MARKER)
    if marker.exists():
        raise FormatError(path, f"was not saved to its end: {marker.name} lies beside it; take another checkpoint")
