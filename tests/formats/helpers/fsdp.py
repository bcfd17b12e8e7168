"""Saves a Hugging Face model and its optimizer as a training run under FSDP2 does: `python fsdp.py HF_FOLDER OUT PROCESSES`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from transformers import AutoModelForCausalLM


def save(rank: int, folder: str, out: str, processes: int, meeting: str) -> None:
    """One process of several: parameters in even shards of rows."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    mesh = init_device_mesh("cpu", (processes,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    weights, state = get_state_dict(model, optimizer)
    save_dcp({"model": weights, "optim": state, "steps": 3}, checkpoint_id=out)
    dist.destroy_process_group()


if __name__ == "__main__":
    source, target, count = sys.argv[1:]
    with tempfile.TemporaryDirectory() as home:
        arguments = (source, target, int(count), str(Path(home) / "meeting"))
        start_processes(save, arguments, nprocs=int(count), start_method="fork")  # type: ignore[no-untyped-call]
