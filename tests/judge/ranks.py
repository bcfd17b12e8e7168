"""Runs one function on every rank of a layout: forked processes joined by gloo, in Megatron-Core's own process groups."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tests.judge.patches import know_classes, prepare

T = TypeVar("T")
TIMEOUT = 120.0


@dataclass(frozen=True)
class Layout:
    """How Megatron-Core is started. `first`, `last`: layers of the first and last stage; `stages`: its layout string.

    `count_embedding`, `count_loss`: the ends count as a layer each (account_for_…_in_pipeline_split). `dp`: how often
    the smallest world that holds the model once is repeated.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None
    first: int | None = None
    last: int | None = None
    stages: str | None = None
    count_embedding: bool = False
    count_loss: bool = False
    dp: int = 1

    @property
    def world(self) -> int:
        return lcm(self.tp, self.ep * (self.etp or self.tp)) * self.pp * self.dp

    @property
    def name(self) -> str:
        said = {k: "" if v is True else v for k, v in vars(self).items() if v is True or v not in (None, False, 1)}
        return "-".join(f"{k}{v}" for k, v in said.items()) or "tp1"


def run_ranks(layout: Layout, job: Callable[[], T]) -> list[T]:
    """`job()` of every rank, in order; results must pickle. A failing or dying rank ends all of them with its traceback."""
    prepare()
    know_classes()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, processes = [], []
        for rank in range(layout.world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(layout, job, rank, f"{folder}/store", there))
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        try:
            return [_result(rank, end) for rank, end in enumerate(ends)]
        finally:
            for process in processes:
                process.join(2)
                process.kill()
                process.join()


def _result(rank: int, end: Connection) -> Any:
    if not end.poll(TIMEOUT):
        raise TimeoutError(f"rank {rank} said nothing for {TIMEOUT:.0f} s")
    try:
        ok, value = end.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if not ok:
        raise RuntimeError(f"rank {rank}:\n{value}")
    return value


def _rank(layout: Layout, job: Callable[[], object], rank: int, store: str, end: Connection) -> None:
    """The forked process: groups, the job, its answer; leaves without running anything of the parent's."""
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # GroupedMLP is decorated to be compiled
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=rank, world_size=layout.world)
        _join_groups(layout)
        with torch.no_grad():
            answer = job()
        dist.barrier()
        end.send((True, answer))
    except BaseException:  # noqa: BLE001 (told to the parent, whatever it is)
        end.send((False, traceback.format_exc()))
        os._exit(1)
    os._exit(0)


def _join_groups(layout: Layout) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
