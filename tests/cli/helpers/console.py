"""Running commands inside the test process, and checkpoints made worse on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

RANK = "model_optim_rng.pt"


class Ran(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Console = Callable[..., Ran]


def rank_file(folder: Path, name: str) -> Path:
    """The file of one rank, `name` as in mp_rank_NAME."""
    (path,) = folder.glob(f"*/mp_rank_{name}/{RANK}")
    return path


def edit_rank(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Load a rank file with torch, change what is in it, save it again."""
    path = rank_file(folder, name)
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)


def edit_hf(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load model.safetensors, change its tensors, save it again."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def bump(tensors: dict[str, torch.Tensor], name: str, *index: int) -> None:
    """One value of a tensor changed."""
    tensors[name][index] += 1


def hollow(folder: Path) -> None:
    """Every weight of a safetensors folder turned into a hole: the header stays, nothing else."""
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.truncate(8 + int.from_bytes(file.read(8), "little"))
        file.truncate(size)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bits(values: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(values).tobytes()
