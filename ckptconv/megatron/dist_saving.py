"""A Stored checkpoint of whole tensors to the files of a distributed one (torch_dist), and Hugging Face files in `hf/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from itertools import product

from ckptconv.assemble import Box
from ckptconv.checkpoint import Stored
from ckptconv.containers import dcp_write, torch_write, zarr2_write
from ckptconv.containers.pickled import Namespace
from ckptconv.dtypes import FP32
from ckptconv.errors import UsageError
from ckptconv.formats import Request
from ckptconv.megatron import run_config
from ckptconv.megatron.args_table import Subject
from ckptconv.megatron.args_write import notes, write_args
from ckptconv.megatron.dist_loading import COMMON, TELLING, TORCH_DIST, ZARR
from ckptconv.megatron.dist_objects import objects
from ckptconv.megatron.dist_optim_write import Filed, OptimizerForm, experts_apart, filed
from ckptconv.megatron.folders import RELEASE, TRACKER, iteration_name
from ckptconv.megatron.measure import LAYER
from ckptconv.megatron.optimizer import generators
from ckptconv.megatron.saving import (
    CHECKPOINT_VERSION,
    Form,
    carried,
    divisor,
    final_file,
    hf_files,
    step_to_write,
    vocab_notes,
)
from ckptconv.megatron.versions import show
from ckptconv.plan import File, Plan
from ckptconv.tensor import Shape, Tensor

PER_FILE = 5 * 10**9  # bytes; on two cores one file takes as long as eight (benchmarks/results.md)


@dataclass(frozen=True, slots=True)
class Filing:
    """How tensors are stored, in how many .distcp files (None: as many as they need), and whether each is one chunk.

    `run_config`: whether Megatron-Bridge's description of the model is written too. `experts_apart`: whether experts have an
    optimizer of their own (None: as in the source).
    """

    backend: str = TORCH_DIST
    files: int | None = None
    whole: bool = False
    run_config: bool = False
    experts_apart: bool | None = None


def save(stored: Stored, step: int | str | None, request: Request, form: Form, filing: Filing) -> Plan:
    """All files. Those that say it is complete come last, the tracker at the very end."""
    (tensors,) = stored.ranks.values()
    if filing.files is not None and filing.files < 1:
        raise UsageError(f"--saver.files {filing.files}: at least one file is needed")
    if filing.files is not None and filing.backend == ZARR:
        raise UsageError(f"--saver.files {filing.files}: {ZARR} has a file for each chunk")
    number = step_to_write(step, stored.extras.step)
    folder = iteration_name(number)
    stacked = "l" in stored.mapping.stack
    apart = experts_apart(stored, filing.experts_apart)
    stored = generators.unless_dealt_anew(stored, apart)
    state = filed(stored, OptimizerForm(form.core, "distributed" in form.written(stored), apart))
    entries = {**objects(stored.config, form.extra, stacked=stacked), **state.objects}
    whole = {key.name: tensor for key, tensor in tensors.items() if key.slot == "param"} | state.tensors
    plan: list[File] = [
        *layout(f"{folder}/", whole, entries, filing, stacked=stacked),
        _common(stored, number, request, form, state, stacked=stacked),
        *hf_files(stored.extras),
        *(
            [final_file(f"{folder}/{run_config.NAME}", run_config.render(stored, form, stored.config.dtype or FP32))]
            * filing.run_config
        ),
        final_file(f"{folder}/{TELLING}", telling(filing.backend)),
        final_file(TRACKER, str(number).encode()),
    ]
    about: dict[str, object] = {
        "iteration": number,
        "mcore_version": show(form.core.version),
        "format_notes": [
            *notes(stored.config, form.core, legacy=False),
            *vocab_notes(stored, request),
            *generators.left_out(stored, distributed=True),
        ],
    }
    return Plan(tuple(plan), about=about)


def _common(stored: Stored, number: int | str, request: Request, form: Form, state: Filed, *, stacked: bool) -> File:
    """What every process has alike. `content_metadata` tells Megatron-Core 0.13 and newer how keys are made."""
    said: dict[str, object] = {"singleton_local_shards": False, "non_homogeneous_layers": not stacked}
    saved: dict[object, object] = {
        "args": written_args(stored, request, form),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0 if number == RELEASE else number,
        "content_metadata": said | state.metadata,
        **state.common,
    }
    return torch_write.layout(f"{iteration_name(number)}/{COMMON}", saved)


def written_args(stored: Stored, request: Request, form: Form) -> Namespace:
    subject = Subject(
        stored.config, stored.topology, form.core, stored.config.dtype or FP32, divisor(stored.extras, request), form.local,
        experts=form.experts, ckpt_format=form.ckpt_format, carried=carried(stored.extras), written=form.written(stored),
    )  # fmt: skip
    args = write_args(subject)
    args.__dict__.update(generators.sizes(generators.shards(stored)))
    return args


def telling(backend: str) -> bytes:
    """The file that makes a folder a distributed checkpoint to Megatron-Core."""
    told = {"sharded_backend": backend, "sharded_backend_version": 1}
    return json.dumps(
        {**told, "common_backend": "torch", "common_backend_version": 1}
    ).encode()  # 0.19 wants the first two


def layout(
    base: str, tensors: Dict[str, Tensor], entries: Dict[str, object], filing: Filing, *, stacked: bool
) -> list[File]:
    """The files of tensors and objects, their paths beginning with `base`."""
    return (_zarr if filing.backend == ZARR else _torch_dist)(base, tensors, entries, filing, stacked)


def _torch_dist(
    base: str, tensors: Dict[str, Tensor], entries: Dict[str, object], filing: Filing, stacked: bool
) -> list[File]:
    """Objects are lists of one, as Megatron-Core saves them."""
    boxes = {
        key: (tensor, list(_boxes(tensor.shape, _chunk(key, tensor, filing, stacked))))
        for key, tensor in tensors.items()
    }
    count = filing.files or max(1, -(-sum(t.nbytes for t in tensors.values()) // PER_FILE))
    lists: dict[str, list[object]] = {}  # equal ones are one list
    listed = {key: lists.setdefault(repr(value), [value]) for key, value in entries.items()}
    return dcp_write.layout(base.removesuffix("/"), boxes, listed, files=count)


def _zarr(
    base: str, tensors: Dict[str, Tensor], entries: Dict[str, object], filing: Filing, stacked: bool
) -> list[File]:
    """Objects are files of their own."""
    chunked = {key: (tensor, _chunk(key, tensor, filing, stacked)) for key, tensor in tensors.items()}
    loose = [torch_write.layout(f"{base}{key}.pt", value) for key, value in entries.items()]
    return [*zarr2_write.layout(base.removesuffix("/"), chunked), *loose]


def _chunk(key: str, tensor: Tensor, filing: Filing, stacked: bool) -> Shape:
    """The shape of a tensor's chunks: one for each layer and each expert that its leading axes number."""
    layers = stacked and ".layers." in key and not LAYER.search(key)  # the image encoder of NeVA has numbered ones
    leading = 0 if filing.whole else layers + (".experts.experts." in key)
    return (*(1 for _ in range(leading)), *tensor.shape[leading:])


def _boxes(shape: Shape, chunk: Shape) -> Iterator[Box]:
    """The grid of chunks of this shape."""
    starts = (range(0, n, max(step, 1)) for n, step in zip(shape, chunk, strict=True))
    for start in product(*starts):
        yield tuple((at, at + step) for at, step in zip(start, chunk, strict=True))
