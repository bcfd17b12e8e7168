"""Starts the processes of a run and joins them by gloo: forked ones of our own, or those that torchrun has made."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

T = TypeVar("T")


def launch(world: int, job: Callable[[], T]) -> list[T]:
    """What `job()` returns on every rank, in order. A rank that fails ends all of them, with its traceback."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the parent's do not compute
        start_processes(_rank, (job, world, Path(folder)), world, start_method="fork")  # type: ignore[no-untyped-call]
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]


def _rank(rank: int, job: Callable[[], object], world: int, folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    (folder / str(rank)).write_bytes(pickle.dumps(joined(job)))


def joined(job: Callable[[], T]) -> T:
    """`job()` on one rank of a process group that has been formed."""
    torch.set_num_threads(1)
    answer = job()
    dist.barrier()
    dist.destroy_process_group()
    return answer
