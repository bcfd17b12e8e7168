"""Megatron's checkpoint of one file per rank: model_optim_rng.pt, and distrib_optim.pt beside it for a distributed optimizer.

A rank's file holds its own part of everything, under names whose layer and expert numbers begin at 0 on each rank. So it can be
resumed at the layout it was saved at (the number of data-parallel copies may change); other layouts need it resharded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ckptconv.trainer.buffers import SLOTS, Slots
from ckptconv.trainer.optimizer import Member
from ckptconv.trainer.parallel import Weight

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run


def save(run: Run, place: Path, common: dict[str, Any]) -> None:
    g, members, t = run.grid, run.optimizer.members, run.config.training
    flats = [m.gathered() for m in members]  # every rank takes part
    if g.replica:
        return  # another copy writes the same
    folder = _folder(run, place, g.ep_rank)
    folder.mkdir(parents=True, exist_ok=True)
    for key, chunk in _chunks(run):
        state = {k: v if v is None else v.detach().to(t.stored, copy=True) for k, v in chunk.state_dict().items()}
        common[key] = OrderedDict(state)
    pairs = list(zip(members, flats, strict=True))
    if t.distributed_optimizer:  # the dense parameters of all expert ranks are in the first one's file
        common["optimizer"] = _single([{"optimizer": {"param_groups": m.settings()}} for m in members])
        held = [_flat_file(m, f, t.stored) if m.experts or not g.ep_rank else None for m, f in pairs]
        torch.save(_single(held), folder / "distrib_optim.pt")
    else:
        common["optimizer"] = _single([_lists(m, f, masters=t.precision == "bf16") for m, f in pairs])
    torch.save(common, folder / "model_optim_rng.pt")


def load(run: Run, place: Path, weights_only: bool) -> dict[str, Any]:
    """Fills the model and, unless `weights_only`, the optimizer; everything that was saved."""
    saved = _read(run, _folder(run, place, run.grid.ep_rank) / "model_optim_rng.pt")
    for key, chunk in _chunks(run):
        chunk.load_state_dict(saved[key])
    members = () if weights_only else run.optimizer.members
    for i, member in enumerate(members):
        state = saved["optimizer"] if len(members) == 1 else saved["optimizer"][i]
        if member.distributed:
            home = _folder(run, place, run.grid.ep_rank if member.experts else 0)
            held = torch.load(home / "distrib_optim.pt", weights_only=False)
            _restore_flat(member, held if len(members) == 1 else held[i], state)
        else:
            _restore_lists(member, state)
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


def _lists(member: Member, flats: Sequence[Slots], *, masters: bool) -> dict[str, Any]:
    """As Megatron's plain optimizers have it: moments under torch's own numbers, and a list of masters per group if there are any."""
    slots = member.views(flats)
    params = [group["params"] for group in member.groups]
    numbers = {w: i for i, w in enumerate(w for ws in params for w in ws)}
    step = torch.tensor(float(member.steps))
    state = {
        i: {"step": step.clone(), **{slot: slots[w][slot].clone() for slot in SLOTS[1:]}} for w, i in numbers.items()
    }
    groups = [g | {"params": [numbers[w] for w in ws]} for g, ws in zip(member.settings(), params, strict=True)]
    inner = {"state": state, "param_groups": groups}
    lists = [[_marked(w, slots[w]["param"]) for w in ws] for ws in params]
    return {"optimizer": inner, "fp32_from_fp16_params": lists} if masters else inner


def _marked(w: Weight, master: Tensor) -> Tensor:
    """A master with the attributes that Megatron gives to parts of tensors."""
    made = master.clone()
    if w.cut is not None:
        vars(made).update(tensor_model_parallel=True, partition_dim=w.cut, partition_stride=w.pieces)
    return made


def _restore_lists(member: Member, state: dict[str, Any]) -> None:
    masters, inner = state.get("fp32_from_fp16_params"), state.get("optimizer", state)
    flats = [{slot: b.blank() for slot in (SLOTS if masters else SLOTS[1:])} for b in member.buffers]
    slots, held = member.views(flats), inner["state"]
    for i, w in enumerate(w for group in member.groups for w in group["params"]):
        for slot in SLOTS[1:]:
            slots[w][slot].copy_(held[i][slot])
    for group, tensors in zip(member.groups, masters or (), strict=False):
        for w, tensor in zip(group["params"], tensors, strict=True):
            slots[w]["param"].copy_(tensor)
    member.restore(flats, [float(entry["step"]) for entry in held.values()])


def _flat_file(member: Member, flats: Sequence[Slots], stored: torch.dtype) -> dict[object, Any]:
    buffers: dict[object, Any] = {"buckets_coalesced": True}
    for i, (b, slots) in enumerate(zip(member.buffers, flats, strict=True)):
        filed = {slot: flat[b.filed] for slot, flat in slots.items()}
        buffers[i] = {(stored, torch.float32): {**filed, "numel_unpadded": len(b.filed)}}
    return buffers


def _restore_flat(member: Member, held: dict[object, Any], state: dict[str, Any]) -> None:
    flats = [{slot: b.blank() for slot in SLOTS} for b in member.buffers]
    for i, (b, slots) in enumerate(zip(member.buffers, flats, strict=True)):
        (filed,) = held[i].values()
        for slot, flat in slots.items():
            flat[b.filed] = filed[slot]
    member.restore(flats, [group["step"] for group in state["optimizer"]["param_groups"]])
