"""Megatron's checkpoint of one file per rank: model_optim_rng.pt, and distrib_optim.pt beside it for a distributed optimizer.

A rank's file holds its own part of everything, under names whose layer and expert numbers begin at 0 on each rank. So it can be
resumed at the layout it was saved at (the number of data-parallel copies may change); other layouts need it resharded.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ckptconv.trainer.config import Config
from ckptconv.trainer.optimizer import SLOTS, Member
from ckptconv.trainer.parallel import Weight

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run


def save(run: Run, place: Path, common: dict[str, Any]) -> None:
    folder, members = _folder(run, place, run.grid.ep_rank), run.optimizer.members
    flat = [_flat_state(run, m) for m in members] if members[0].distributed else []
    if run.grid.replica:
        return  # another copy writes the same
    folder.mkdir(parents=True, exist_ok=True)
    if flat:
        torch.save(_single(flat), folder / "distrib_optim.pt")
    common |= {key: _parameters(run.config, chunk) for key, chunk in _chunks(run)}
    common["optimizer"] = _single([_optimizer_state(run, m) for m in members])
    torch.save(common, folder / "model_optim_rng.pt")


def load(run: Run, place: Path, weights_only: bool) -> dict[str, Any]:
    """Fills the model and, unless `weights_only`, the optimizer; everything that was saved."""
    saved = _read(run, _folder(run, place, run.grid.ep_rank) / "model_optim_rng.pt")
    for key, chunk in _chunks(run):
        chunk.load_state_dict(saved[key])
    members = () if weights_only else run.optimizer.members
    for i, member in enumerate(members):
        state = saved["optimizer"] if len(members) == 1 else saved["optimizer"][i]
        if member.distributed:  # the dense parameters of all expert ranks are in the first one's file
            home = _folder(run, place, run.grid.ep_rank if member.experts else 0)
            shares = torch.load(home / "distrib_optim.pt", weights_only=False)
            _restore_flat(member, shares if len(members) == 1 else shares[i], state)
        else:
            _restore_plain(member, state)
    return saved


def _folder(run: Run, place: Path, ep_rank: int) -> Path:
    g = run.grid
    numbers = [f"{g.tp_rank:02d}"] + [f"{g.pp_rank:03d}"] * (g.pp > 1) + [f"{ep_rank:03d}"] * (g.ep > 1)
    return place / "_".join(["mp_rank", *numbers])


def _chunks(run: Run) -> list[tuple[str, nn.Module]]:
    return [("model" if len(run.chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(run.chunks)]


def _read(run: Run, path: Path) -> dict[str, Any]:
    """The file of this rank, if the checkpoint was saved at this layout."""
    at, wanted = run.config.layout, run.config.training.distributed_optimizer
    if not path.is_file():
        raise ValueError(f"{path} is missing: was the checkpoint saved at another layout than {at}? Then reshard it")
    saved: dict[str, Any] = torch.load(path, weights_only=False)
    had = saved["args"]
    degrees = (had.tensor_model_parallel_size, had.pipeline_model_parallel_size, had.expert_model_parallel_size)
    chunks = had.virtual_pipeline_model_parallel_size or 1
    if (*degrees, chunks) != (at.tp, at.pp, at.ep, at.vpp):
        raise ValueError(f"{path}: saved at tp, pp, ep {degrees} with {chunks} chunks; this run is {at}: reshard it")
    if had.use_distributed_optimizer != wanted:
        raise ValueError(f"{path}: use_distributed_optimizer is {had.use_distributed_optimizer}, of this run {wanted}")
    return saved


def _single(states: list[Any]) -> Any:
    """A chain of one is filed without a list."""
    return states[0] if len(states) == 1 else states


def _parameters(config: Config, chunk: nn.Module) -> OrderedDict[str, Tensor | None]:
    dtype = config.training.stored
    return OrderedDict((k, v if v is None else v.detach().to(dtype, copy=True)) for k, v in chunk.state_dict().items())


def _optimizer_state(run: Run, member: Member) -> dict[str, Any]:
    """As Megatron's three optimizers have it: moments under torch's own numbers, masters in a list per group."""
    if member.distributed:
        return {"optimizer": {"param_groups": member.settings(run.iteration)}}
    state = member.adam.state_dict()
    if run.config.training.precision != "bf16":
        return state
    masters = [[_marked(w, member.pieces[w].master) for w in weights] for weights in member.groups.values()]
    return {"optimizer": state, "fp32_from_fp16_params": masters}


def _restore_plain(member: Member, state: dict[str, Any]) -> None:
    member.reload()
    for weights, masters in zip(member.groups.values(), state.get("fp32_from_fp16_params", ()), strict=False):
        for w, master in zip(weights, masters, strict=True):
            member.pieces[w].master.data.copy_(master)
    member.adam.load_state_dict(state.get("optimizer", state))


def _marked(w: Weight, master: Tensor) -> Tensor:
    """A master with the attributes that Megatron gives to parts of tensors."""
    made = master.detach().clone()
    if w.cut is not None:
        vars(made).update(tensor_model_parallel=True, partition_dim=w.cut, partition_stride=w.pieces)
    return made


def _flat_state(run: Run, member: Member) -> dict[object, Any] | None:
    """The buffers of all owners, on the one rank that has the file: data-parallel rank 0 of this member's group."""
    dtypes, slots = (run.config.training.stored, torch.float32), member.slots()
    buffers: dict[object, Any] = {"buckets_coalesced": True}
    for i, b in enumerate(member.buffers):
        flats = {slot: b.flattened({w: slots[w][slot] for w in b.starts}) for slot in SLOTS}
        buffers[i] = {dtypes: {**flats, "numel_unpadded": len(flats["param"])}}
    return None if (run.grid.replica if member.experts else run.grid.dp_rank) else buffers


def _restore_flat(member: Member, shares: dict[object, Any], state: dict[str, Any]) -> None:
    steps = int(state["optimizer"]["param_groups"][0]["step"])
    for i, b in enumerate(member.buffers):
        (stored,) = shares[i].values()
        flats = {slot: b.with_padding(stored[slot]) for slot in SLOTS}
        for w in b.starts:
            member.restore(w, {slot: b.of(w, flat) for slot, flat in flats.items()}, steps)
