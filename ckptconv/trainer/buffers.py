"""Flat storage for parameters and their gradients, laid out as Megatron's: backward order, aligned, in buckets.

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

from ckptconv.trainer.config import Config
from ckptconv.trainer.parallel import Group, Weight

PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128


class Bucket(NamedTuple):
    start: int
    filled: int  # where its last parameter ends
    end: int  # after padding


class Buffer:
    """The trained parameters of one model chunk (or its experts), gradients beside them.

    After each backward pass of a micro-batch its gradients are added here, in at least float32, and dropped.
    """

    def __init__(self, config: Config, weights: Sequence[Weight], group: Group, distributed: bool) -> None:
        self.group, self.distributed = group, distributed
        self.starts, self.buckets = layout(weights, group.size(), distributed)
        size = self.buckets[-1].end
        self.values = torch.zeros(size, dtype=config.training.compute)
        self.gradients = torch.zeros(size, dtype=config.training.gradients)
        for w in weights:
            home = self.of(w, self.values)
            home.copy_(w.detach())
            w.data = home
            w.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]

    def of(self, w: Weight, flat: Tensor) -> Tensor:
        """A parameter's place in a flat tensor of this layout."""
        start = self.starts[w]
        return flat[start : start + w.numel()].view(w.shape)

    def _collect(self, w: Tensor) -> None:
        assert isinstance(w, Weight)
        assert w.grad is not None
        self.of(w, self.gradients).add_(w.grad)
        w.grad = None

    def owned(self, w: Weight) -> range:
        """The elements of a parameter that this rank updates: all, or what falls into its share of the bucket."""
        start = self.starts[w]
        if not self.distributed:
            return range(w.numel())
        bucket = next(b for b in self.buckets if b.start <= start < b.end)
        size = (bucket.end - bucket.start) // self.group.size()
        mine = bucket.start + self.group.rank() * size
        return range(max(mine - start, 0), min(mine + size - start, w.numel()))

    def average_gradients(self, copies: int) -> None:
        """Sums over the group, divided by the data-parallel copies; a distributed optimizer gets its share of the sum alone."""
        self.gradients /= copies
        if not self.distributed:
            dist.all_reduce(self.gradients, group=self.group)
            return
        for bucket in self.buckets:
            parts = [part.clone() for part in self._shares(bucket, self.gradients)]
            dist.reduce_scatter(self._shares(bucket, self.gradients)[self.group.rank()], parts, group=self.group)

    def _shares(self, bucket: Bucket, flat: Tensor) -> list[Tensor]:
        return list(flat[bucket.start : bucket.end].chunk(self.group.size()))

    def gather(self, flat: Tensor) -> None:
        """Every rank's share of a flat tensor, brought to all ranks."""
        for bucket in self.buckets if self.distributed else ():
            shares = self._shares(bucket, flat)
            dist.all_gather(shares, shares[self.group.rank()].clone(), group=self.group)

    def flattened(self, tensors: Mapping[Weight, Tensor]) -> Tensor:
        """Float32 tensors of the parameters' shapes as they are filed: in the buffer's order, less the padding of buckets."""
        flat = torch.zeros(len(self.values))
        for w, tensor in tensors.items():
            self.of(w, flat).copy_(tensor)
        return torch.cat([flat[b.start : b.filled] for b in self.buckets])

    def with_padding(self, stored: Tensor) -> Tensor:
        flat, taken = torch.zeros(self.buckets[-1].end, dtype=stored.dtype), 0
        for b in self.buckets:
            flat[b.start : b.filled] = stored[taken : taken + b.filled - b.start]
            taken += b.filled - b.start
        return flat


def layout(weights: Sequence[Weight], ranks: int, distributed: bool) -> tuple[dict[Weight, int], list[Bucket]]:
    """Where each parameter starts, and the buckets. Without a distributed optimizer nothing is padded.

    A shared embedding has a bucket of its own, so that the first and the last stage give the same share of it to the same rank.
    """

    def aligned(n: int, to: int) -> int:
        return -(-n // to) * to if distributed else n

    def close(filled: int) -> int:
        end = aligned(filled, lcm(ranks, BUCKET_ALIGNMENT))
        buckets.append(Bucket(bucket_start, filled, end))
        return end

    starts: dict[Weight, int] = {}
    buckets: list[Bucket] = []
    bucket_start = at = 0
    for w in reversed(weights):
        at = aligned(at, PARAMETER_ALIGNMENT)
        alone = w.shared and distributed
        if alone and at > bucket_start:
            bucket_start = at = close(at)
        starts[w] = at
        at += w.numel()
        if alone:
            bucket_start = at = close(at)
    if at > bucket_start:
        close(at)
    return starts, buckets
