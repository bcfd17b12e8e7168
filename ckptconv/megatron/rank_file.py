"""One rank's file, read without its payload: tensors by dotted name per model chunk, args, versions, and what else it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptconv.containers import torch_file
from ckptconv.containers.pickled import Namespace
from ckptconv.errors import FormatError
from ckptconv.megatron import extra_state
from ckptconv.megatron.folders import RankFile
from ckptconv.tensor import Tensor

_CHUNK = re.compile(r"model(\d{0,3})")
MAX_DEPTH = 16
TRAINING = ("optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state")
FLAT_RNG = (
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
)  # before 2022
KNOWN = {  # what Megatron saves beside the model: read, or told as training state; other keys are told as left behind
    "args", "checkpoint_version", "iteration", "total_iters", "optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state",
    "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states",
    "content_metadata", "mp_rank",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankContent:
    """What one process saved. `chunks` are its model chunks (one without virtual stages); `training` is what is no weight, as it was
    pickled, and `state` names it; `strays` what is not known.
    """

    file: RankFile
    chunks: tuple[dict[str, Tensor], ...]
    args: dict[str, object] | None
    version: float | None
    iteration: int | None
    state: tuple[str, ...] = field(default=())
    strays: tuple[str, ...] = field(default=())
    training: dict[str, object] = field(default_factory=dict)

    def where(self, chunk: int = 0) -> str:
        return self.file.name + (f" model{chunk}" if len(self.chunks) > 1 else "")


def read_rank(file: RankFile, check: bool, rename: Callable[[str], str]) -> RankContent:
    """The file's object taken apart; `rename` gives names their current spelling."""
    saved = torch_file.read(file.path, check=check)
    if not isinstance(saved, dict):
        raise FormatError(file.path, f"holds a {type(saved).__name__}, expected the dictionary that Megatron saves")
    return RankContent(
        file,
        tuple(model_tensors(saved[key], rename, f"{file.path}: {key}") for key in _chunk_keys(saved, file)),
        args_of(saved, file.path),
        _version(saved, file),
        step_of(saved, file.path),
        tuple(state_of(saved)),
        (
            *sorted(str(k)[:60] for k in saved if k not in KNOWN and not _CHUNK.fullmatch(str(k))),
            *(
                word
                for key in _chunk_keys(saved, file)
                for word in extra_state.contents(_extra(saved[key], f"{file.path}: {key}"))
            ),
        ),
        _training(saved),
    )


def _training(saved: dict[object, object]) -> dict[str, object]:
    """The training state; generators in their own list, which old files do without."""
    held = {key: saved[key] for key in TRAINING if saved.get(key) is not None}
    if "rng_state" not in held and all(key in saved for key in FLAT_RNG):
        held["rng_state"] = [{key: saved[key] for key in FLAT_RNG}]
    return held


def _chunk_keys(saved: dict[object, object], file: RankFile) -> list[str]:
    """`model`, or model0, model1, … where the pipeline is interleaved."""
    keys = [k for k in saved if isinstance(k, str) and _CHUNK.fullmatch(k)]
    wanted = ["model"] if "model" in keys else [f"model{i}" for i in range(len(keys))]
    if not keys or sorted(keys) != sorted(wanted):
        listed = ", ".join(sorted(map(str, saved)))[:300] or "nothing"
        raise FormatError(file.path, f"expected the key model, or model0, model1 and so on; found {listed}")
    return wanted


def model_tensors(model: object, rename: Callable[[str], str], where: str) -> dict[str, Tensor]:
    """Nested dictionaries flattened to dotted names. `_extra_state` is not the model's and is set aside."""
    if not isinstance(model, dict):
        raise FormatError(where, f"is a {type(model).__name__}, expected a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    odd = []
    for name, value in _flat(model, "", 0, where):
        if name.endswith("_extra_state"):
            continue
        if not isinstance(value, Tensor):
            odd.append(f"{name} ({type(value).__name__})")
            continue
        current = rename(name)
        if current in tensors:
            raise FormatError(where, f"{name} is stored twice, in an old and a new spelling")
        tensors[current] = value
    if odd:
        raise FormatError(where, f"{len(odd)} entries are no tensors: {', '.join(odd[:8])}")
    return tensors


def _extra(model: object, where: str) -> Iterator[object]:
    """The `_extra_state` entries of a chunk."""
    flat = _flat(model, "", 0, where) if isinstance(model, dict) else ()
    return (value for name, value in flat if name.endswith(extra_state.NAME))


def _flat(table: dict[object, object], prefix: str, depth: int, where: str) -> Iterator[tuple[str, object]]:
    if depth > MAX_DEPTH:
        raise FormatError(where, f"dictionaries are nested more than {MAX_DEPTH} deep")
    for key, value in table.items():
        if not isinstance(key, str):
            raise FormatError(where, f"{prefix}: a key is {key!r}, expected a name")
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.", depth + 1, where)
        else:
            yield prefix + key, value


def args_of(saved: dict[object, object], where: Path) -> dict[str, object] | None:
    args = saved.get("args")
    if args is None:
        return None
    if not isinstance(args, Namespace):
        raise FormatError(where, f"args are a {type(args).__name__}, expected an argparse.Namespace")
    return dict(args.__dict__)


def _version(saved: dict[object, object], file: RankFile) -> float | None:
    version = saved.get("checkpoint_version")
    if version is None:
        return None
    if isinstance(version, bool) or version not in (0, 1.0, 2.0, 3.0):
        raise FormatError(file.path, f"checkpoint_version is {version!r}; known are 0, 1.0, 2.0 and 3.0")
    return float(str(version))


def step_of(saved: dict[object, object], where: Path) -> int | None:
    step = saved.get("iteration", saved.get("total_iters"))
    if step is None:
        return None
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise FormatError(where, f"iteration is {step!r}, expected a number")
    return step


def state_of(saved: dict[object, object]) -> Iterator[str]:
    """Training state, in words a user knows."""
    optimizer = saved.get("optimizer")
    if optimizer is not None:
        groups = _param_groups(optimizer, 0)
        yield f"optimizer ({groups} param groups)" if groups else "optimizer"
    if any(saved.get(key) is not None for key in ("opt_param_scheduler", "lr_scheduler")):
        yield "learning rate scheduler"
    if any(saved.get(key) is not None for key in ("rng_state", "random_rng_state", "rng_tracker_states")):
        yield "RNG state"


def _param_groups(optimizer: object, depth: int) -> int:
    if isinstance(optimizer, list):
        return sum(_param_groups(o, depth + 1) for o in optimizer) if depth < 4 else 0
    if not isinstance(optimizer, dict) or depth > 4:
        return 0
    groups = optimizer.get("param_groups")
    return len(groups) if isinstance(groups, list) else _param_groups(optimizer.get("optimizer"), depth + 1)
