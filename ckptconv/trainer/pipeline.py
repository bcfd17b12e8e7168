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


def one_forward_one_backward(stages: int, rank: int, batches: int) -> list[Op]:
    """1F1B: enough micro-batches ahead to keep later stages busy, then one back for each one forward, then the rest back."""
    ahead = min(stages - rank - 1, batches)
    forward = [Op(True, b, 0) for b in range(batches)]
    back = [Op(False, b, 0) for b in range(batches)]
    return _interlock(forward, back, ahead)


def interleaved(stages: int, rank: int, batches: int, chunks: int) -> list[Op]:
    """The same with several chunks per rank: `stages` micro-batches pass one chunk before the next chunk has its turn."""
    ahead = min((stages - rank - 1) * 2 + (chunks - 1) * stages, batches * chunks)
    round_ = stages * chunks

    def turn(k: int, forward: bool) -> Op:
        chunk = k % round_ // stages
        return Op(forward, k // round_ * stages + k % stages, chunk if forward else chunks - 1 - chunk)

    steps = range(batches * chunks)
    return _interlock([turn(k, True) for k in steps], [turn(k, False) for k in steps], ahead)


def _interlock(forward: list[Op], back: list[Op], ahead: int) -> list[Op]:
    steady = [op for pair in zip(forward[ahead:], back, strict=False) for op in pair]
    return forward[:ahead] + steady + back[len(forward) - ahead :]


class Mail:
    """Messages between stages. Sending never waits and every message has its own tag, so no order of work can deadlock."""

    def __init__(self, grid: Grid, batches: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.grid, self.batches, self.shape, self.dtype = grid, batches, shape, dtype
        self.sent: list[tuple[dist.Work, Tensor]] = []

    def _tag(self, edge: int, batch: int, forward: bool) -> int:
        return (edge * self.batches + batch) * 2 + int(forward)

    def send(self, x: Tensor, stage: int, edge: int, op: Op) -> None:
        x = x.contiguous()
        work = dist.isend(x, self.grid.peer(stage), tag=self._tag(edge, op.batch, op.forward))
        assert work is not None
        self.sent.append((work, x))

    def receive(self, stage: int, edge: int, op: Op) -> Tensor:
        x = torch.empty(self.shape, dtype=self.dtype)
        dist.recv(x, self.grid.peer(stage), tag=self._tag(edge, op.batch, op.forward))
        return x

    def close(self) -> None:
        for work, _ in self.sent:
            work.wait()


def run(
    chunks: Sequence[nn.Module], grid: Grid, batches: Sequence[Batch], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """One pass over all micro-batches, gradients added up in the parameters; the mean loss, or zero away from the last stage.

    The edge between stages s and s + 1 has the number s. A stage whose parameters are all frozen still passes gradients back.
    """
    count, last = len(batches), grid.pp * len(chunks) - 1
    mail = Mail(grid, count, shape, dtype)
    waiting: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
    total = torch.zeros((), dtype=torch.float64)
    for op in _order(grid, count, len(chunks)):
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


def _order(grid: Grid, batches: int, chunks: int) -> list[Op]:
    if chunks == 1:
        return one_forward_one_backward(grid.pp, grid.pp_rank, batches)
    return interleaved(grid.pp, grid.pp_rank, batches, chunks)
