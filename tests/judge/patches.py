"""Stand-ins for the CUDA calls that Megatron-Core makes without asking, so that its own models build and run on a CPU.

Only device plumbing is replaced; what decides names, shapes, sharding and arithmetic is Megatron-Core's own code.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import sys
import types
import warnings
from functools import cache
from typing import Any

import torch


@cache
def prepare() -> None:
    """Import megatron.core with everything in place that a machine without CUDA lacks. Once per process; forks inherit it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _replace_cuda_calls()
        importlib.import_module("megatron.core.models.gpt")
        _replace_megatron_calls()


def know_classes() -> None:
    """Megatron-Core's safe classes are torch's too, as on import: `safe_globals(...)` of another test takes them away when it ends."""
    with contextlib.suppress(ImportError):  # 0.12 has none
        importlib.import_module("megatron.core.safe_globals").register_safe_globals()


class _Stream:
    """Stands in for torch.cuda.Stream; a class, since transformers annotates with it."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...


def _replace_cuda_calls() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"  # given as device= in many constructors
    cuda.synchronize = lambda *_, **__: None
    cuda.Stream = _Stream
    cuda.current_stream = lambda *_, **__: _Stream()
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *_, **__: self  # tied embeddings with several stages


def _replace_megatron_calls() -> None:
    import megatron.core.fusions.fused_softmax as softmax
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils

    random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()  # dropout is 0 here
    random.CudaRNGStatesTracker.add = lambda self, name, seed: None
    softmax.get_default_causal_mask = lambda n: torch.triu(torch.ones(n, n), diagonal=1).bool()
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 uses the name without defining it when TE is absent
        moe_utils.te_general_gemm = None
    _provide_grouped_gemm()
    _write_checkpoints_with_what_is_there()


def _provide_grouped_gemm() -> None:
    """The CUDA package `grouped_gemm`, as the loop over groups that it is; GroupedMLP's own layout stays untouched."""
    import megatron.core.transformer.moe.grouped_gemm_util as util

    def gmm(rows: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
        parts = torch.split(rows, [int(n) for n in sizes])
        return torch.cat([p @ (w.T if trans_b else w) for p, w in zip(parts, weights, strict=True)])

    package = types.ModuleType("grouped_gemm")
    ops = types.SimpleNamespace(gmm=gmm)
    package.ops = ops  # type: ignore[attr-defined]
    sys.modules.setdefault("grouped_gemm", package)
    util.grouped_gemm, util.ops = package, ops


def _write_checkpoints_with_what_is_there() -> None:
    """Saving torch_dist asks psutil for a number that is only logged, and starts a server process for one queue."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

    writer._process_memory = lambda: 0
    writer._get_write_results_queue = cache(queue.Queue)  # a save that is not asynchronous fills and empties it itself
