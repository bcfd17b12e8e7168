"""Tensor, expert and data parallelism: who works with whom, and the layers that are cut.

A parameter here is always one rank's part. Column-parallel layers hold rows of the weight and give every rank its own outputs;
row-parallel layers hold columns and sum what the ranks made of their inputs. One sum forward and one backward per pair.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

from ckptconv.trainer.config import Config

Group = dist.ProcessGroup


class Grid:
    """The ranks of a run as a block of pipeline x replica x expert x tensor, last axis fastest, which is Megatron's order.

    Data-parallel copies are the two middle axes taken together: ranks of one expert group see different data too.
    """

    def __init__(self, config: Config) -> None:
        at, world = config.layout, dist.get_world_size()
        self.config, self.dp = config, config.check(world)
        self.tp, self.pp, self.ep = at.tp, at.pp, at.ep
        self.ranks = torch.arange(world).view(self.pp, self.dp // self.ep, self.ep, self.tp)
        here = (self.ranks == dist.get_rank()).nonzero()[0].tolist()
        self.pp_rank, self.replica, self.ep_rank, self.tp_rank = here
        self.dp_rank = self.replica * self.ep + self.ep_rank
        (self.tensor,) = self._groups(self.ranks, 3)
        (self.expert,) = self._groups(self.ranks, 2)
        (self.data,) = self._groups(self.ranks, 1, 2)
        (self.expert_data,) = self._groups(self.ranks, 1)
        self.ends = self._groups(self.ranks[[0, -1]], 0) if self.pp > 1 else []

    def _groups(self, ranks: Tensor, *along: int) -> list[Group]:
        """The one group of ranks that differ from this one along these axes only, if it is in one. All processes make all groups."""
        others = [a for a in range(4) if a not in along]
        rows = ranks.permute(*others, *along).reshape(-1, prod(ranks.shape[a] for a in along)).tolist()
        return [group for group in map(dist.new_group, rows) if isinstance(group, Group)]

    def peer(self, stage: int) -> int:
        """The rank that holds the same part of another pipeline stage."""
        return int(self.ranks[stage % self.pp, self.replica, self.ep_rank, self.tp_rank])

    def close(self) -> None:
        for group in (self.tensor, self.expert, self.data, self.expert_data, *self.ends):
            dist.destroy_process_group(group)


class Weight(nn.Parameter):
    """One rank's part of a parameter, with its place in the whole: cut along axis `cut` into tp parts, if it is cut at all."""

    whole: tuple[int, ...]
    cut: int | None
    pieces: int  # 2: two stacked matrices (gate and up), each cut for itself
    init: float | None  # the deviation of its random start; 0 for zeros, None for ones
    layer: int | None = None  # counted over the whole model, as is the expert
    expert: int | None = None
    spread: bool = False  # an expert's that not every data-parallel rank has
    shared: bool = False  # the embedding that is the output layer too


def weight(
    grid: Grid, shape: tuple[int, ...], cut: int | None = None, pieces: int = 1, init: float | None = 0.02
) -> Weight:
    local = [n // grid.tp if axis == cut else n for axis, n in enumerate(shape)]
    made = Weight(torch.empty(local, dtype=grid.config.training.compute))
    made.whole, made.cut, made.pieces, made.init = shape, cut, pieces, init
    return made


class _Sum(torch.autograd.Function):
    """The sum over a group: of x on the way there, of its gradients on the way back, or both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: bool, back: bool) -> Tensor:
        ctx.group, ctx.back = group, back
        return _total(x, group) if there else x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _total(grad, ctx.group) if ctx.back else grad, None, None, None


def _total(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _sum(x: Tensor, group: Group, *, there: bool, back: bool) -> Tensor:
    return _Sum.apply(x, group, there, back) if group.size() > 1 else x  # type: ignore[no-untyped-call]


def copy(x: Tensor, grid: Grid) -> Tensor:
    """Into a column-parallel layer: the same input on every rank, so its gradients add up."""
    return _sum(x, grid.tensor, there=False, back=True)


def reduce(x: Tensor, grid: Grid) -> Tensor:
    """Out of a row-parallel layer: outputs add up, and every rank gets the whole gradient."""
    return _sum(x, grid.tensor, there=True, back=False)


def gather_tokens(x: Tensor, grid: Grid) -> Tensor:
    """The tokens of all expert ranks, so that each can pick those its experts are to see."""
    rows, own = torch.zeros_like(x), grid.ep_rank
    return _sum(torch.cat([x if rank == own else rows for rank in range(grid.ep)]), grid.expert, there=True, back=True)


def scatter_tokens(x: Tensor, grid: Grid) -> Tensor:
    """The way back: what all experts made of this rank's tokens."""
    return _sum(x, grid.expert, there=True, back=True).chunk(grid.ep)[grid.ep_rank]  # type: ignore[no-any-return]


COLUMN, ROW = 0, 1  # the axis of [outputs, inputs] that Megatron's column- and row-parallel linears cut


class Linear(nn.Module):
    """Column-parallel: every rank has its own outputs. Row-parallel: its own inputs; outputs are summed, then comes the whole bias.

    A tied output layer has no weight and is given the embedding's. The (empty) extra state is Megatron's: a key in the checkpoint.
    """

    def __init__(self, grid: Grid, cut: int, inputs: int, outputs: int, *, bias: bool = False, pieces: int = 1) -> None:
        super().__init__()
        init = 0.02 if cut == COLUMN else 0.02 / (2 * grid.config.model.layers) ** 0.5
        self.grid, self.cut = grid, cut
        self.weight: Weight | None = weight(grid, (outputs, inputs), cut, pieces, init)
        self.bias = weight(grid, (outputs,), 0 if cut == COLUMN else None, pieces, 0.0) if bias else None

    def forward(self, x: Tensor, tied: Tensor | None = None) -> Tensor:
        matrix = self.weight if tied is None else tied
        assert matrix is not None
        if self.cut == COLUMN:
            return F.linear(copy(x, self.grid), matrix, self.bias)
        y = reduce(F.linear(x, matrix), self.grid)
        return y if self.bias is None else y + self.bias

    def get_extra_state(self) -> None: ...

    def set_extra_state(self, state: object) -> None: ...


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens of its own rows and gives zeros for others; the sum is the embedding."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        m = grid.config.model
        self.grid, self.weight = grid, weight(grid, (m.vocab, m.hidden), 0)
        self.weight.shared = m.tied

    def forward(self, ids: Tensor) -> Tensor:
        row, foreign = _own_rows(ids, self.weight.shape[0], self.grid)
        return reduce(F.embedding(row, self.weight).masked_fill(foreign[..., None], 0), self.grid)


def _own_rows(ids: Tensor, rows: int, grid: Grid) -> tuple[Tensor, Tensor]:
    row = ids - grid.tp_rank * rows
    foreign = (row < 0) | (row >= rows)
    return row.masked_fill(foreign, 0), foreign


def vocab_parallel_loss(logits: Tensor, labels: Tensor, grid: Grid) -> Tensor:
    """Cross entropy of logits whose vocabulary is cut: log(sum exp) - logit of the label, without ever gathering them.

    Three numbers per token cross the wire: the maximum (for safety only, so it has no gradient), the sum, the label's logit.
    """
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    maximum = logits.detach().amax(-1)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=grid.tensor)
    shifted = logits - maximum[..., None]
    row, foreign = _own_rows(labels, logits.shape[-1], grid)
    wanted = shifted.gather(-1, row[..., None])[..., 0].masked_fill(foreign, 0)
    return torch.log(reduce(shifted.exp().sum(-1), grid)) - reduce(wanted, grid)
