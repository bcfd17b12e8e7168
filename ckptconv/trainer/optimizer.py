"""Adam on float32 masters, as Megatron has it: dense and expert parameters apart, plain or sharded over data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ckptconv.trainer.buffers import SLOTS, Buffer, Slots
from ckptconv.trainer.config import TrainingConfig
from ckptconv.trainer.model import named_weights
from ckptconv.trainer.parallel import Grid, Weight


class Member:
    """One Adam of the chain: for the dense parameters, or for the experts where they are spread over expert ranks.

    `groups` are what torch calls param_groups: matrices, which decay, and vectors, which do not; all ranks have a group if one has
    use for it.
    """

    def __init__(self, grid: Grid, chunks: Sequence[nn.Module], experts: bool) -> None:
        t = grid.config.training
        self.experts, self.distributed, self.steps = experts, t.distributed_optimizer, 0
        self.betas, self.eps = (t.beta1, t.beta2), t.eps
        trained = [[w for _, w in named_weights(c) if w.requires_grad and spread(w, grid) == experts] for c in chunks]
        self.buffers = [Buffer(t, ws, grid.expert_data if experts else grid.data) for ws in trained if ws]
        settings = torch.optim.AdamW([torch.zeros(0)], t.lr, self.betas, t.eps, t.weight_decay).defaults | {
            "is_expert_parallel": experts, "default_config": True, "lr_mult": 1.0, "is_decoupled_lr": False,
            "max_lr": t.lr, "min_lr": t.min_lr,
        }  # fmt: skip
        every = [w for ws in trained for w in ws]
        self.groups: list[dict[str, Any]] = []
        for matrices in (True, False):
            params = [w for w in every if (w.dim() > 1) == matrices]
            dist.all_reduce(users := torch.tensor(len(params)))
            self.groups += [{"params": params, "wd_mult": float(matrices), **settings}] * bool(users)

    def update(self, scale: float) -> None:
        """AdamW on gradients rounded to float32; parameters are rounded from the masters."""
        self.steps += 1
        unbiased, unbiased_square = (1 - beta**self.steps for beta in self.betas)
        kept = {w: 1 - group["lr"] * group["weight_decay"] for group in self.groups for w in group["params"]}
        for b in self.buffers:
            gradient = (b.gradients[b.mine] * scale).float()
            master, mean, square = (b.slots[slot] for slot in SLOTS)
            mean.lerp_(gradient, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            root = (square / unbiased_square).sqrt() + self.eps
            master.mul_(b.share(kept)).addcdiv_(mean, root, value=-self.groups[0]["lr"] / unbiased)
            b.values.copy_(b.gather(master))
            b.gradients.zero_()

    def views(self, flats: Sequence[Slots]) -> dict[Weight, Slots]:
        """Of flat tensors for each buffer, what belongs to each parameter."""
        pairs = list(zip(self.buffers, flats, strict=True))
        return {w: {slot: b.of(w, flat) for slot, flat in slots.items()} for b, slots in pairs for w in b.starts}

    def gathered(self) -> list[Slots]:
        """The flat slots of each buffer, brought together from all who own them."""
        return [{slot: b.gather(share) for slot, share in b.slots.items()} for b in self.buffers]

    def settings(self) -> list[dict[str, Any]]:
        """The groups without their parameters. A distributed optimizer keeps the step count here."""
        step = {"step": float(self.steps)} if self.distributed else {}
        return [{key: value for key, value in group.items() if key != "params"} | step for group in self.groups]

    def restore(self, flats: Sequence[Slots], steps: Collection[float]) -> None:
        """Slots and the count of updates, which is one for all parameters; nothing (`steps` empty) begins anew."""
        if len(set(steps)) > 1:
            raise ValueError(f"parameters of one optimizer have made different numbers of steps: {sorted(set(steps))}")
        self.steps = int(max(steps, default=0))
        for b, slots in zip(self.buffers, flats, strict=True):
            b.restore(slots)


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


class Optimizer:
    """The chain of members, and what they share: the average over copies, the tied weights' sum, the norm, the clip."""

    def __init__(self, grid: Grid, chunks: Sequence[nn.Module]) -> None:
        self.grid, self.training = grid, grid.config.training
        self.members = [Member(grid, chunks, experts) for experts in (False, True)[: 2 if grid.ep > 1 else 1]]
        if not any(m.groups for m in self.members):
            raise ValueError(f"freeze = {self.training.freeze}: nothing is left to train")

    @torch.no_grad()
    def step(self) -> float:
        """One update; the norm of the gradient before clipping."""
        total = torch.zeros((), dtype=torch.float64)
        for b in (b for m in self.members for b in m.buffers):
            b.gradients /= self.grid.dp
            dist.all_reduce(b.gradients, group=b.group)
            for w in b.starts:
                for ends in (
                    self.grid.ends if w.shared else ()
                ):  # both uses of a tied weight count, so that its copies stay equal
                    dist.all_reduce(b.of(w, b.gradients), group=ends)
            counted = b.share({w: speaks_for(w, self.grid, shared_out=b.distributed) for w in b.starts})
            total += (b.gradients[b.mine] * counted).double().square().sum()
        dist.all_reduce(total)
        norm = math.sqrt(total.item())
        for m in self.members:
            m.update(min(1.0, self.training.clip / (norm + 1e-6)))
        return norm


class Scheduler:
    """Megatron's: the learning rate rises from zero over `warmup` samples and falls until `decay`. Its state counts samples."""

    def __init__(self, t: TrainingConfig, optimizer: Optimizer) -> None:
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
            for group in member.groups:
                group["lr"] = self.rate()
                group["weight_decay"] = self.settings["end_wd"] * group["wd_mult"]

    def state(self) -> dict[str, Any]:
        return self.settings | {"num_steps": self.samples}

    def restore(self, state: dict[str, Any]) -> None:
        """The settings of the run that saved go on, as they do in Megatron."""
        self.settings, self.samples = dict(state), state["num_steps"]
        self.advance(0)
