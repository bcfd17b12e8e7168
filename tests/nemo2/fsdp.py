"""Saves named tensors as a model under FSDP1 does, a file for each process: `python fsdp.py TENSORS.pt OUT sharded|dtensor PROCESSES`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType
from torch.multiprocessing.spawn import start_processes


def module(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Modules within modules that have these parameters, under these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        at = root
        *path, last = name.split(".")
        for word in path:
            if word not in dict(at.named_children()):
                at.add_module(word, nn.Module())
            at = at.get_submodule(word)
        at.register_parameter(last, nn.Parameter(tensor))
    return root


def save(rank: int, source: str, out: str, kind: str, processes: int, meeting: str) -> None:
    """One process of several: flat parameters in even shards, told as parts of the parameters they are made of."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    saved = torch.load(source)
    mesh: Any = {"device_mesh": init_device_mesh("cpu", (processes,))} if kind == "dtensor" else {}
    model = FullyShardedDataParallel(module(saved["state_dict"]), device_id=torch.device("cpu"), **mesh)
    how = ShardedStateDictConfig(offload_to_cpu=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, how):
        state = model.state_dict()
    folder = Path(out) / f"fsdp_shard_{rank:05d}"
    folder.mkdir(parents=True)
    torch.save({**saved, "state_dict": state}, folder / "last.ckpt")
    dist.destroy_process_group()


if __name__ == "__main__":
    tensors, target, wanted, count = sys.argv[1:]
    with tempfile.TemporaryDirectory() as home:
        arguments = (tensors, target, wanted, int(count), str(Path(home) / "meeting"))
        start_processes(save, arguments, nprocs=int(count), start_method="fork")  # type: ignore[no-untyped-call]
