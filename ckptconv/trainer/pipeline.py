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
    """Messages between stages. Sending never waits and every message has its own tag, so no order of work can deadlock.

    The edge between stages s and s + 1 has the number s.
    """

    def __init__(self, grid: Grid, batches: int, shape: tuple[int, ...]) -> None:
        self.grid, self.batches, self.shape = grid, batches, shape
        self.sent: list[tuple[dist.Work | None, Tensor]] = []  # a tensor has to live until it is sent

    def _tag(self, edge: int, op: Op) -> int:
        return (edge * self.batches + op.batch) * 2 + op.forward

    def send(self, x: Tensor, stage: int, edge: int, op: Op) -> None:
        x = x.contiguous()
        self.sent.append((dist.isend(x, self.grid.peer(stage), tag=self._tag(edge, op)), x))

    def receive(self, stage: int, edge: int, op: Op) -> Tensor:
        x = torch.empty(self.shape, dtype=self.grid.config.training.compute)
        dist.recv(x, self.grid.peer(stage), tag=self._tag(edge, op))
        return x

    def close(self) -> None:
        for work, _ in self.sent:
            assert work is not None
            work.wait()


def run(chunks: Sequence[nn.Module], grid: Grid, batches: Sequence[Batch]) -> Tensor:
    """One pass over all micro-batches, gradients added up in the parameters; the mean loss, or zero away from the last stage.

    A stage whose parameters are all frozen still passes gradients back.
    """
    count, last, config = len(batches), grid.pp * len(chunks) - 1, grid.config
    mail = Mail(grid, count, (config.positions, config.training.micro_batch, config.model.hidden))
    waiting: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    total = torch.zeros((), dtype=torch.float64)
    for op in order(grid.pp, grid.pp_rank, count, len(chunks)):
        stage = op.chunk * grid.pp + grid.pp_rank
        if op.forward:
            x = mail.receive(stage - 1, stage - 1, op).requires_grad_() if stage else None
            y = chunks[op.chunk](x, batches[op.batch])
            waiting[op.batch, op.chunk] = x, y
            if stage < last:
                mail.send(y.detach(), stage + 1, stage, op)
            else:
                total += y.detach() / count
        else:
            x, y = waiting.pop((op.batch, op.chunk))
            grad = mail.receive(stage + 1, stage, op) if stage < last else torch.full_like(y, 1 / count)
            if y.requires_grad:
                torch.autograd.backward(y, grad)
            if x is not None:
                assert x.grad is not None
                mail.send(x.grad, stage - 1, stage - 1, op)
    mail.close()
    return total
