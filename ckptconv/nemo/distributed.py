"""A distributed checkpoint in a folder that NeMo saved: Megatron-Core's tensors behind a prefix, and Lightning's `common.pt`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckptconv.checkpoint import Stored
from ckptconv.containers import dcp, torch_file, zarr2
from ckptconv.containers.dcp_metadata import NAME as METADATA
from ckptconv.errors import FormatError
from ckptconv.formats import Request
from ckptconv.megatron.args_read import Statement
from ckptconv.megatron.dist_loading import (
    COMMON,
    TELLING,
    TORCH_DIST,
    ZARR,
    Contents,
    backend,
    from_whole,
    of_torch_dist,
    of_zarr,
)
from ckptconv.megatron.hf_beside import Beside
from ckptconv.nemo import omegaconf
from ckptconv.nemo.names import prefix_of
from ckptconv.nemo.run_state import RunState, run_state
from ckptconv.source import Source
from ckptconv.tensor import Tensor

SHARDED_RUN = ("optimizer.", "chained_", "rng_state", "common_state")  # of a training run: these have no prefix
USED = (METADATA, TELLING, COMMON)


def is_distributed(folder: Path) -> bool:
    """Whether a folder is one, from names alone."""
    return (folder / TELLING).is_file() and (folder / COMMON).is_file()


def read_common(folder: Path) -> tuple[dict[object, object], RunState]:
    """What is not cut over processes, and what of it is a training run's."""
    saved = common(folder / COMMON if (folder / COMMON).exists() else None, f"{folder / COMMON}")
    return saved, run_state(saved, folder / COMMON)


def common(file: Path | Source | None, where: str) -> dict[object, object]:
    """What `common.pt` holds; nothing where there is none."""
    saved = torch_file.read(file, where=where, calls=omegaconf.CALLS) if file is not None else {}
    if not isinstance(saved, dict):
        raise FormatError(where, f"holds a {type(saved).__name__}, expected a dictionary")
    return saved


def load(folder: Path, saved: RunState, said: Statement | None, beside: Beside, request: Request, name: str) -> Stored:
    """The model from the metadata and the headers of its blobs."""
    kind = backend(folder)
    found = of_zarr(zarr2.read(folder)) if kind == ZARR else of_torch_dist(dcp.read(folder), check=request.check)
    stored = from_whole(bare(found, folder), said, beside, request, str(folder), name)
    extras = stored.extras
    notes = [*extras.notes, *([f"left behind in {COMMON}: {', '.join(saved.strays)}"] if saved.strays else [])]
    if kind == TORCH_DIST and (rest := sorted(p.name for p in folder.iterdir() if not _is_used(p))):
        notes.append(f"left behind in {folder.name}: {', '.join(rest)}")
    state = list(dict.fromkeys([*saved.state, *extras.state]))
    objects = {**extras.objects, "backend": kind, "state": state}
    return replace(stored, extras=replace(extras, step=saved.step, notes=tuple(notes), objects=objects))


def _is_used(path: Path) -> bool:
    return path.name in USED or path.suffix == dcp.SUFFIX or path.name.startswith(".")


def bare(contents: Contents, where: object) -> Contents:
    """The same without what stands before every name of the model."""
    keys = [key for key in (*contents.shapes, *contents.objects) if not key.startswith(SHARDED_RUN)]
    prefix = prefix_of(keys, where)
    stored = {key.removeprefix(prefix): key for key in (*contents.shapes, *contents.objects)}

    def tensors(names: list[str]) -> dict[str, Tensor]:
        found = contents.tensors([stored[name] for name in names])
        return {name: found[stored[name]] for name in names}

    return Contents(
        {key.removeprefix(prefix): shape for key, shape in contents.shapes.items()},
        {key.removeprefix(prefix): nbytes for key, nbytes in contents.objects.items()},
        tensors,
        lambda name: contents.value(stored[name]),
        contents.unused,
    )
