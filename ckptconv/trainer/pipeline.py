"""Pipeline parallelism: the order in which a stage goes forward and back, and the messages between stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ckptconv.trainer.model import Batch
from ckptconv.trainer.parallel import Grid


class Op(NamedTuple):
    """One thing a rank does: micro-batch `batch` through its chunk `chunk`, forward or back."""

    forward: bool
    batch: int
    chunk: int


def order(stages: int, rank: int, batches: int, chunks: int) -> list[Op]:
    """1F1B: enough micro-batches ahead to keep later stages busy, then one back for each one forward, then the rest back.

    Interleaved, `stages` micro-batches pass one chunk before the next chunk has its turn, and twice as many stand between stages.
    """

    def turn(k: int, forward: bool) -> Op:
        rounds, k = divmod(k, stages * chunks)
        chunk, batch = divmod(k, stages)
        return Op(forward, rounds * stages + batch, chunk if forward else chunks - 1 - chunk)

    count = batches * chunks
    ahead = min((stages - rank - 1) * (1 if chunks == 1 else 2) + (chunks - 1) * stages, count)
    forward, back = ([turn(k, way) for k in range(count)] for way in (True, False))
    steady = [op for pair in zip(forward[ahead:], back, strict=False) for op in pair]
    return forward[:ahead] + steady + back[count - ahead :]


class Mail:
    """Messages between stages. Sending never waits and every message has its own tag, so no order of work can deadlock."""

    def __init__(self, grid: Grid, batches: int) -> None:
        self.grid, self.batches = grid, batches
        self.sent: list[tuple[dist.Work | None, Tensor]] = []  # a tensor has to live until it is sent

    def _tag(self, to: int, op: Op) -> int:
        return (to * self.batches + op.batch) * 2 + op.forward

    def send(self, x: Tensor, to: int, op: Op) -> None:
        x = x.contiguous()
        self.sent.append((dist.isend(x, self.grid.peer(to), tag=self._tag(to, op)), x))

    def receive(self, source: int, to: int, op: Op) -> Tensor:
        m, t = self.grid.config.model, self.grid.config.training
        x = torch.empty(self.grid.config.positions, t.micro_batch, m.hidden, dtype=t.compute)
        dist.recv(x, self.grid.peer(source), tag=self._tag(to, op))
        return x

    def close(self) -> None:
        for work, _ in self.sent:
            work.wait()  # type: ignore[union-attr]


def run(chunks: Sequence[nn.Module], grid: Grid, batches: Sequence[Batch]) -> Tensor:
    """One pass over all micro-batches, gradients added up; the mean loss, or zero away from the last stage."""
    count, last = len(batches), grid.pp * len(chunks) - 1
    mail = Mail(grid, count)
    waiting: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    total = torch.zeros((), dtype=torch.float64)
    for op in order(grid.pp, grid.pp_rank, count, len(chunks)):
        stage = op.chunk * grid.pp + grid.pp_rank
        if op.forward:
            x = mail.receive(stage - 1, stage, op).requires_grad_() if stage else None
            y = chunks[op.chunk](x, batches[op.batch])
            waiting[op.batch, op.chunk] = x, y
            if stage < last:
                mail.send(y.detach(), stage + 1, op)
            else:
                total += y.detach() / count
        else:
            x, y = waiting.pop((op.batch, op.chunk))
            grad = mail.receive(stage + 1, stage, op) if stage < last else torch.full_like(y, 1 / count)
            if y.requires_grad:
                torch.autograd.backward(y, grad)
            if x is not None:  # also where all parameters are frozen
                assert x.grad is not None
                mail.send(x.grad, stage - 1, op)
    mail.close()
    return total
