"""What training with Megatron-Core's optimizers needs on a CPU beyond `patches`; called in a rank's own process, never in the tests'."""

from __future__ import annotations

import functools
from typing import Any

import torch

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like", "arange", "rand", "randn")


def prepare_training() -> None:
    """Devices named "cuda" are the CPU, names of tensor types say cuda as Megatron-Core tests for, and streams are empty words."""
    import megatron.core

    anything: Any = torch
    for name in FACTORIES:
        setattr(anything, name, _on_the_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.type = _said_to_be_cuda(torch.Tensor.type)
    cuda: Any = torch.cuda
    cuda.default_stream = cuda.current_stream
    cuda.empty_cache = lambda *_, **__: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    _let_adam_of_torch_be_restored()
    if megatron.core.__version__.startswith("0.12."):
        _train_with_newer_packages()


def _on_the_cpu(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        if "cuda" in str(options.get("device")):
            options["device"] = "cpu"
        return make(*args, **options)

    return made


def _said_to_be_cuda(of: Any) -> Any:
    def said(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = of(self, *args, **options)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    return said


def _let_adam_of_torch_be_restored() -> None:
    """torch's AdamW keeps its step count as a tensor beside the moments, which the Adam of a GPU does not and no file has."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    restore = DistributedOptimizer._set_main_param_and_optimizer_states

    def restored(self: Any, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        here = self._get_main_param_and_optimizer_states(parameter)
        restore(self, parameter, {**tensors, **({"step": here["step"].clone()} if "step" in here else {})})

    DistributedOptimizer._set_main_param_and_optimizer_states = restored


def _train_with_newer_packages() -> None:
    """Megatron-Core 0.12 calls torch and numpy as they were, and wants TransformerEngine for what is a no-op without fp8."""
    import multiprocessing

    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.optimizer.distrib_optimizer as distributed
    import numpy as np
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    old: Any = writer
    old._write_item = functools.partial(old._write_item, serialization_format=SerializationFormat.TORCH_SAVE)
    old._get_write_results_queue = functools.cache(multiprocessing.get_context("fork").Queue)  # it writes in a fork
    numpy: Any = np
    numpy.product = np.prod
    distributed.quantize_param_shard = lambda *_, **__: None
