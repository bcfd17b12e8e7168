"""Adam on float32 masters, as Megatron has it: dense and expert parameters apart, plain or sharded over data-parallel ranks.

Parameters lie in flat buffers laid out as Megatron's: backward order, aligned, in buckets. With a distributed optimizer each
data-parallel rank owns an equal share of every bucket. Therefore the layout is part of the checkpoint: distrib_optim.pt holds the
buffers as they lie, without the padding at the ends of buckets.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ckptconv.trainer.config import TrainingConfig
from ckptconv.trainer.model import named_weights
from ckptconv.trainer.parallel import Grid, Group, Weight

PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
SLOTS = ("param", "exp_avg", "exp_avg_sq")  # the float32 master, and Adam's moments
Slots = dict[str, Tensor]


class Bucket(NamedTuple):
    start: int
    filled: int  # where its last parameter ends
    end: int  # after padding


class Buffer:
    """The trained parameters of one model chunk (or its experts), gradients beside them, and slots of what this rank updates."""

    def __init__(self, t: TrainingConfig, weights: Sequence[Weight], group: Group) -> None:
        self.group, self.distributed = group, t.distributed_optimizer
        self.starts, buckets = layout(weights, group.size(), self.distributed)
        owners, owner = (group.size(), group.rank()) if self.distributed else (1, 0)
        self.mine = torch.cat([torch.arange(b.start, b.end).chunk(owners)[owner] for b in buckets])
        self.filed = torch.cat([torch.arange(b.start, b.filled) for b in buckets])
        self.values = torch.zeros(buckets[-1].end, dtype=t.compute)
        self.gradients = torch.zeros_like(self.values, dtype=t.gradients)
        for w in weights:
            home = self.of(w, self.values)
            home.copy_(w.detach())
            w.data = home
            w.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]
        self.restore({})

    def of(self, w: Weight, flat: Tensor) -> Tensor:
        """A parameter's place in a flat tensor of this layout."""
        start = self.starts[w]
        return flat[start : start + w.numel()].view(w.shape)

    def blank(self) -> Tensor:
        return torch.zeros(len(self.values))

    def _collect(self, w: Tensor) -> None:
        """After the backward pass of a micro-batch: gradients add up here in at least float32."""
        assert isinstance(w, Weight)
        assert w.grad is not None
        self.of(w, self.gradients).add_(w.grad)
        w.grad = None

    def share(self, values: Mapping[Weight, float]) -> Tensor:
        """This rank's share of a flat tensor with one value per parameter."""
        flat = self.blank()
        for w in self.starts:
            self.of(w, flat).fill_(values[w])
        return flat[self.mine]

    def gather(self, share: Tensor) -> Tensor:
        """The flat tensor of which every rank has its share."""
        flat = self.blank()
        flat[self.mine] = share
        if self.distributed:
            dist.all_reduce(flat, group=self.group)  # the shares do not overlap
        return flat

    def restore(self, flats: Slots) -> None:
        """This rank's share of flat slots; without them masters begin from the parameters, moments at zero."""
        fresh = dict(zip(SLOTS, (self.values.float(), self.blank(), self.blank()), strict=True))
        self.slots = {slot: flat[self.mine] for slot, flat in (fresh | flats).items()}


def layout(weights: Sequence[Weight], ranks: int, distributed: bool) -> tuple[dict[Weight, int], list[Bucket]]:
    """Where each parameter starts, and the buckets. Without a distributed optimizer nothing is padded."""

    def aligned(n: int, to: int) -> int:
        return -(-n // to) * to if distributed else n

    starts: dict[Weight, int] = {}
    buckets: list[Bucket] = []
    start = at = 0
    backward = list(reversed(weights))
    for w, following in zip(backward, [*backward[1:], None], strict=True):
        starts[w] = at = aligned(at, PARAMETER_ALIGNMENT)
        at += w.numel()
        # a shared embedding alone in a bucket: so the first and the last stage give the same share of it to the same rank
        if following is None or (distributed and (w.shared or following.shared)):
            filled = at if following is None or w.shared else aligned(at, PARAMETER_ALIGNMENT)
            end = aligned(filled, math.lcm(ranks, BUCKET_ALIGNMENT))
            buckets.append(Bucket(start, filled, end))
            start = at = end
    return starts, buckets


class Member:
    """One Adam of the chain: for the dense parameters, or for the experts where they are spread over expert ranks."""

    def __init__(self, grid: Grid, chunks: Sequence[nn.Module], experts: bool) -> None:
        t = grid.config.training
        self.experts, self.distributed, self.steps = experts, t.distributed_optimizer, 0
        self.betas, self.eps = (t.beta1, t.beta2), t.eps
        trained = [[w for _, w in named_weights(c) if w.requires_grad and w.spread == experts] for c in chunks]
        self.buffers = [Buffer(t, ws, grid.expert_data if experts else grid.data) for ws in trained if ws]
        settings = torch.optim.AdamW([torch.zeros(0)], t.lr, self.betas, t.eps, t.weight_decay).defaults | {
            "is_expert_parallel": experts, "default_config": True, "lr_mult": 1.0, "is_decoupled_lr": False,
            "max_lr": t.lr, "min_lr": t.min_lr,
        }  # fmt: skip
        every = [w for ws in trained for w in ws]
        self.groups: list[dict[str, Any]] = []  # torch's param_groups: matrices decay, vectors do not
        for matrices in (True, False):
            params = [w for w in every if (w.dim() > 1) == matrices]
            dist.all_reduce(users := torch.tensor(len(params)))  # all ranks have a group if one has use for it
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

    def gathered(self) -> list[Slots]:
        """The flat slots of each buffer, brought together from all who own them."""
        return [{slot: b.gather(share) for slot, share in b.slots.items()} for b in self.buffers]

    def blank(self, slots: Iterable[str]) -> list[Slots]:
        """The same to be filled and given to `restore`."""
        return [{slot: b.blank() for slot in slots} for b in self.buffers]

    def views(self, flats: Sequence[Slots]) -> dict[Weight, Slots]:
        """Of such flat slots, what belongs to each parameter."""
        pairs = list(zip(self.buffers, flats, strict=True))
        return {w: {slot: b.of(w, flat) for slot, flat in slots.items()} for b, slots in pairs for w in b.starts}

    @property
    def params(self) -> list[Weight]:
        """In the order in which they are numbered."""
        return [w for group in self.groups for w in group["params"]]

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


def speaks_for(w: Weight, grid: Grid, *, shared_out: bool = False) -> bool:
    """Whether this rank is the one, of all that hold the same, to count or write it; `shared_out`: each copy has a share of its own.

    Copies are those of data parallelism, the uncut parameters of tensor ranks, and the tied head, which is the embedding.
    """
    copy = grid.replica if w.spread else grid.dp_rank
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
                for ends in self.grid.ends if w.shared else ():  # both uses count, so that tied copies stay equal
                    dist.all_reduce(b.of(w, b.gradients), group=ends)
            counted = b.share({w: speaks_for(w, self.grid, shared_out=b.distributed) for w in b.starts})
            total += (b.gradients[b.mine] * counted).double().square().sum()
        dist.all_reduce(total)
        norm = math.sqrt(total.item())
        for m in self.members:
            m.update(min(1.0, self.training.clip / (norm + 1e-6)))
        return norm


class Scheduler:
    """Megatron's: the learning rate rises from zero over `warmup` samples and falls as a cosine until `decay`. Its state counts samples."""

    def __init__(self, t: TrainingConfig, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state: dict[str, Any] = {
            "max_lr": t.lr, "lr_warmup_steps": t.warmup, "num_steps": 0, "lr_decay_style": "cosine",
            "lr_decay_steps": t.decay, "min_lr": t.min_lr, "start_wd": t.weight_decay, "end_wd": t.weight_decay,
            "wd_incr_style": "constant", "wd_incr_steps": t.decay,
        }  # fmt: skip
        self.advance(0)

    def rate(self) -> float:
        s, gone = self.state, self.state["num_steps"] - self.state["lr_warmup_steps"]
        if s["lr_warmup_steps"] and gone <= 0:
            return float(s["max_lr"] * s["num_steps"] / s["lr_warmup_steps"])
        gone = min(gone / (s["lr_decay_steps"] - s["lr_warmup_steps"]), 1)
        return float(s["min_lr"] + 0.5 * (math.cos(math.pi * gone) + 1) * (s["max_lr"] - s["min_lr"]))

    def advance(self, samples: int) -> None:
        self.state["num_steps"] += samples
        for group in (group for member in self.optimizer.members for group in member.groups):
            group["lr"] = self.rate()
            group["weight_decay"] = self.state["end_wd"] * group["wd_mult"]

    def restore(self, state: dict[str, Any]) -> None:
        """The settings of the run that saved go on, as they do in Megatron."""
        self.state = dict(state)
        self.advance(0)
