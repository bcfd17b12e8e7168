"""Adam on float32 masters, as Megatron has it: dense and expert parameters apart, plain or sharded over data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ckptconv.trainer.buffers import Buffer
from ckptconv.trainer.config import Config
from ckptconv.trainer.model import weights_of
from ckptconv.trainer.parallel import Grid, Weight

SLOTS = ("param", "exp_avg", "exp_avg_sq")
Slots = dict[str, Tensor]


class Piece(NamedTuple):
    """The elements of a parameter that this rank updates, and their float32 master."""

    buffer: Buffer
    elements: range
    start: int  # of the elements in the buffer
    master: Tensor

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + len(self.elements)].view(self.master.shape)


class Member:
    """One Adam of the chain: for the dense parameters, or for the experts where they are spread over expert ranks.

    `groups` are matrices, which decay, and vectors, which do not; a group is there on every rank if any rank has use for it.
    """

    def __init__(self, config: Config, grid: Grid, chunks: Sequence[nn.Module], experts: bool) -> None:
        t = config.training
        self.experts, self.distributed = experts, t.distributed_optimizer
        group = grid.expert_data if experts else grid.data
        trained = [[w for w in weights_of(c) if w.requires_grad and spread(w, grid) == experts] for c in chunks]
        self.buffers = [Buffer(config, weights, group, self.distributed) for weights in trained if weights]
        every = [w for weights in trained for w in weights]
        self.groups = _used_somewhere([[w for w in every if w.dim() > 1], [w for w in every if w.dim() == 1]])
        self.pieces = {w: piece for b in self.buffers for w in b.starts if (piece := _piece(b, w))}
        kind = {"is_expert_parallel": experts, "default_config": True}
        rates = {"lr_mult": 1.0, "is_decoupled_lr": False, "max_lr": t.lr, "min_lr": t.min_lr}
        groups = [
            {
                "params": [self.pieces[w].master for w in weights if w in self.pieces],
                **kind,
                "wd_mult": wd_mult,
                **rates,
            }
            for wd_mult, weights in self.groups.items()
        ]
        betas = (t.beta1, t.beta2)
        self.adam = torch.optim.AdamW(groups, lr=t.lr, betas=betas, eps=t.eps, weight_decay=t.weight_decay)

    def update(self, scale: float) -> None:
        """Adam on gradients rounded to float32, parameters rounded from the masters."""
        for p in self.pieces.values():
            p.master.grad = (p.of(p.buffer.gradients) * scale).float()
        self.adam.step()
        for p in self.pieces.values():
            p.of(p.buffer.values).copy_(p.master)
        for b in self.buffers:
            b.gather(b.values)
            b.gradients.zero_()

    def slots(self) -> dict[Weight, Slots]:
        """Master and moments of all parameters, gathered from those who own them."""
        found: dict[Weight, Slots] = {w: {} for b in self.buffers for w in b.starts}
        for b in self.buffers:
            for slot in SLOTS:
                flat = torch.zeros(len(b.values))
                for p in (p for p in self.pieces.values() if p.buffer is b):
                    held = {"param": p.master.detach(), **self.adam.state.get(p.master, {})}
                    p.of(flat).copy_(held.get(slot, torch.zeros(())))
                b.gather(flat)
                for w in b.starts:
                    found[w][slot] = b.of(w, flat)
        return found

    def settings(self, steps: int) -> list[dict[str, Any]]:
        """The parameter groups without the parameters. A distributed optimizer keeps the step count here."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.adam.state_dict()["param_groups"]]
        return [g | {"step": float(steps)} for g in groups] if self.distributed else groups

    def reload(self) -> None:
        """Masters begin again from the parameters."""
        for p in self.pieces.values():
            p.master.data.copy_(p.of(p.buffer.values))

    def restore(self, w: Weight, slots: Slots, steps: int) -> None:
        """What this rank owns of a parameter's slots, taken over."""
        if (p := self.pieces.get(w)) is None:
            return
        mine = slice(p.elements.start, p.elements.stop)
        own = {slot: whole.reshape(-1)[mine].view(p.master.shape) for slot, whole in slots.items()}
        p.master.data.copy_(own["param"])
        if steps:
            moments = {slot: own[slot].clone() for slot in SLOTS[1:]}
            self.adam.state[p.master] = {"step": torch.tensor(float(steps)), **moments}


def spread(w: Weight, grid: Grid) -> bool:
    """Whether a parameter is an expert's that not every data-parallel rank has."""
    return w.expert is not None and grid.ep > 1


def speaks_for(w: Weight, grid: Grid, *, shared_out: bool = False) -> bool:
    """Whether this rank is the one, of all that hold the same, to count or write it; `shared_out`: each copy has a share of its own.

    Copies are those of data parallelism, the uncut parameters of tensor ranks, and the tied head, which is the embedding.
    """
    copy = grid.replica if spread(w, grid) else grid.dp_rank
    again = w.shared and grid.ends and grid.pp_rank
    return (shared_out or copy == 0) and not again and (w.cut is not None or grid.tp_rank == 0)


def _used_somewhere(groups: list[list[Weight]]) -> dict[float, list[Weight]]:
    """By their multiple of the weight decay, those groups that are not empty on all ranks."""
    used = torch.tensor([bool(g) for g in groups], dtype=torch.int32)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    return {wd_mult: g for wd_mult, g, flag in zip((1.0, 0.0), groups, used.tolist(), strict=True) if flag}


def _piece(buffer: Buffer, w: Weight) -> Piece | None:
    own = buffer.owned(w)
    if not own:
        return None
    master = w.detach().reshape(-1)[own.start : own.stop].float().clone()
    return Piece(buffer, own, buffer.starts[w] + own.start, master if buffer.distributed else master.view(w.shape))


class Optimizer:
    """The chain of members, and what they share: the average over copies, the tied weights' sum, the norm, the clip."""

    def __init__(self, config: Config, grid: Grid, chunks: Sequence[nn.Module]) -> None:
        self.grid, self.clip = grid, config.training.clip
        self.members = [Member(config, grid, chunks, experts) for experts in (False, True)[: 2 if grid.ep > 1 else 1]]
        if not any(m.groups for m in self.members):
            raise ValueError(f"freeze = {config.training.freeze}: nothing is left to train")

    @torch.no_grad()
    def step(self) -> float:
        """One update; the norm of the gradient before clipping."""
        for m in self.members:
            for b in m.buffers:
                b.average_gradients(self.grid.dp)
        self._sum_shared()
        norm = self._norm()
        for m in self.members:
            m.update(min(1.0, self.clip / (norm + 1e-6)))
        return norm

    def _sum_shared(self) -> None:
        """A tied weight on the first and the last stage gets the gradient of both uses, so that the copies stay equal."""
        for w, p in self.members[0].pieces.items():
            for ends in self.grid.ends if w.shared else ():
                dist.all_reduce(p.of(p.buffer.gradients), group=ends)

    def _norm(self) -> float:
        """Over all parameters of the model, each element counted once."""
        total = torch.zeros((), dtype=torch.float64)
        for m in self.members:
            for w, p in m.pieces.items():
                if speaks_for(w, self.grid, shared_out=m.distributed):
                    total += p.of(p.buffer.gradients).double().square().sum()
        dist.all_reduce(total)
        return math.sqrt(total.item())


class Scheduler:
    """Megatron's: the learning rate rises from zero over `warmup` samples and falls until `decay`. Its state counts samples."""

    def __init__(self, config: Config, optimizer: Optimizer) -> None:
        t = config.training
        self.samples = 0
        self.optimizer = optimizer
        self.settings: dict[str, Any] = {
            "max_lr": t.lr, "lr_warmup_steps": t.warmup, "num_steps": 0, "lr_decay_style": t.decay_style,
            "lr_decay_steps": t.decay, "min_lr": t.min_lr, "start_wd": t.weight_decay, "end_wd": t.weight_decay,
            "wd_incr_style": "constant", "wd_incr_steps": t.decay,
        }  # fmt: skip
        self.advance(0)

    def rate(self) -> float:
        s = self.settings
        warmup, decay, low, high = s["lr_warmup_steps"], s["lr_decay_steps"], s["min_lr"], s["max_lr"]
        if warmup and self.samples <= warmup:
            return float(high * self.samples / warmup)
        if s["lr_decay_style"] == "constant":
            return float(high)
        if self.samples > decay:
            return float(low)
        gone = (self.samples - warmup) / (decay - warmup)
        left = 1 - gone if s["lr_decay_style"] == "linear" else 0.5 * (math.cos(math.pi * gone) + 1)
        return float(low + left * (high - low))

    def advance(self, samples: int) -> None:
        self.samples += samples
        for member in self.optimizer.members:
            for group in member.adam.param_groups:
                group["lr"] = self.rate()
                group["weight_decay"] = self.settings["end_wd"] * group["wd_mult"]

    def state(self) -> dict[str, Any]:
        return self.settings | {"num_steps": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        """The settings of the run that saved go on, as they do in Megatron."""
        self.settings, self.samples = dict(state), state["num_steps"]
        self.advance(0)
