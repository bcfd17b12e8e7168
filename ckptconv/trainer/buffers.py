"""Flat storage for parameters and all that belongs to them, laid out as Megatron's: backward order, aligned, in buckets.

With a distributed optimizer each data-parallel rank owns an equal share of every bucket. Therefore the layout is part of the
checkpoint: distrib_optim.pt holds the buffers as they lie, without the padding at the ends of buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ckptconv.trainer.config import TrainingConfig
from ckptconv.trainer.parallel import Group, Weight

PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
SLOTS = ("param", "exp_avg", "exp_avg_sq")  # the float32 master, and Adam's moments
Slots = dict[str, Tensor]


class Bucket(NamedTuple):
    start: int
    filled: int  # where its last parameter ends
    end: int  # after padding


class Buffer:
    """The trained parameters of one model chunk (or its experts), gradients beside them, and slots of what this rank updates.

    After each backward pass of a micro-batch its gradients are added here, in at least float32, and dropped.
    """

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

    def restore(self, flats: Mapping[str, Tensor]) -> None:
        """This rank's share of flat slots; without them masters begin from the parameters, moments at zero."""
        fresh = {"param": self.values.float(), "exp_avg": self.blank(), "exp_avg_sq": self.blank()}
        self.slots = {slot: flat[self.mine] for slot, flat in (fresh | dict(flats)).items()}


def layout(weights: Sequence[Weight], ranks: int, distributed: bool) -> tuple[dict[Weight, int], list[Bucket]]:
    """Where each parameter starts, and the buckets. Without a distributed optimizer nothing is padded.

    A shared embedding has a bucket of its own, so that the first and the last stage give the same share of it to the same rank.
    """

    def aligned(n: int, to: int) -> int:
        return -(-n // to) * to if distributed else n

    starts: dict[Weight, int] = {}
    buckets: list[Bucket] = []
    start = at = 0
    backward = list(reversed(weights))
    for w, following in zip(backward, [*backward[1:], None], strict=True):
        starts[w] = at = aligned(at, PARAMETER_ALIGNMENT)
        at += w.numel()
        if following is None or (distributed and (w.shared or following.shared)):
            filled = at if following is None or w.shared else aligned(at, PARAMETER_ALIGNMENT)
            end = aligned(filled, lcm(ranks, BUCKET_ALIGNMENT))
            buckets.append(Bucket(start, filled, end))
            start = at = end
    return starts, buckets
