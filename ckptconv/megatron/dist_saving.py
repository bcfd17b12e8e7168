"""A Stored checkpoint of whole tensors to the files of a distributed one (torch_dist), and Hugging Face files in `hf/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ckptconv.assemble import Box
from ckptconv.checkpoint import Stored
from ckptconv.containers import dcp_write, torch_write
from ckptconv.errors import ConfigError, UsageError
from ckptconv.formats import Request
from ckptconv.megatron.args_table import Subject
from ckptconv.megatron.args_write import notes, write_args
from ckptconv.megatron.dist_loading import COMMON, TELLING, TORCH_DIST
from ckptconv.megatron.dist_objects import objects
from ckptconv.megatron.folders import RELEASE, TRACKER, iteration_name
from ckptconv.megatron.saving import (
    CHECKPOINT_VERSION,
    Form,
    carried,
    divisor,
    final_file,
    hf_files,
    step_to_write,
    stored_dtype,
)
from ckptconv.megatron.versions import show
from ckptconv.plan import File, Plan
from ckptconv.tensor import Shape

PER_FILE = 5 * 10**9  # bytes; with fewer files than workers, workers wait for each other


@dataclass(frozen=True, slots=True)
class Filing:
    """Into how many files (None: as many as they need), and whether each tensor is one chunk."""

    files: int | None = None
    whole: bool = False


def save(stored: Stored, step: int | str | None, request: Request, form: Form, filing: Filing) -> Plan:
    """All files. Those that say it is complete come last, the tracker at the very end."""
    (tensors,) = stored.ranks.values()
    if slots := sorted({key.slot for key in tensors} - {"param"}):
        raise ConfigError(f"optimizer state ({', '.join(slots)}) cannot be written yet: --optimizer drop leaves it out")
    if filing.files is not None and filing.files < 1:
        raise UsageError(f"--saver.files {filing.files}: at least one file is needed")
    number = step_to_write(step, stored.extras.step)
    folder = iteration_name(number)
    stacked = "l" in stored.mapping.stack
    cut = {
        key.name: (tensor, list(_boxes(key.name, tensor.shape, stacked, filing.whole)))
        for key, tensor in tensors.items()
    }
    count = filing.files or max(1, -(-sum(t.nbytes for t in tensors.values()) // PER_FILE))
    entries = objects(stored.config, form.extra, stacked=stacked)
    telling = {
        "sharded_backend": TORCH_DIST,
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    plan: list[File] = [
        *dcp_write.layout(folder, cut, entries, files=count),
        _common(stored, number, request, form, stacked=stacked),
        *hf_files(stored.extras),
        final_file(f"{folder}/{TELLING}", json.dumps(telling).encode()),
        final_file(TRACKER, str(number).encode()),
    ]
    about: dict[str, object] = {
        "iteration": number,
        "mcore_version": show(form.core.version),
        "format_notes": list(notes(stored.config, form.core, legacy=False)),
    }
    return Plan(tuple(plan), about=about)


def _common(stored: Stored, number: int | str, request: Request, form: Form, *, stacked: bool) -> File:
    """What every process has alike. `content_metadata` tells Megatron-Core 0.13 and newer how keys are made."""
    subject = Subject(
        stored.config, stored.topology, form.core, stored_dtype(stored), divisor(stored.extras, request), form.local,
        experts=form.experts, ckpt_format=form.ckpt_format, carried=carried(stored.extras),
    )  # fmt: skip
    saved: dict[object, object] = {
        "args": write_args(subject),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0 if number == RELEASE else number,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": not stacked},
    }
    return torch_write.layout(f"{iteration_name(number)}/{COMMON}", saved)


def _boxes(name: str, shape: Shape, stacked: bool, whole: bool) -> Iterator[Box]:
    """The chunks of a tensor: one for each layer and each expert that its leading axes number."""
    leading = 0 if whole else (stacked and ".layers." in name) + (".experts.experts." in name)
    rest = tuple((0, n) for n in shape[leading:])
    for index in product(*map(range, shape[:leading])):
        yield (*((i, i + 1) for i in index), *rest)
