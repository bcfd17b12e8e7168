"""Tensor, expert and data parallelism: who works with whom, and the layers that are cut.

A parameter here is always one rank's part. Column-parallel layers hold rows of the weight and give every rank its own outputs;
row-parallel layers hold columns and sum what the ranks made of their inputs. One sum forward and one backward per pair.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor, nn

from ckptconv.trainer.config import Config

Group = dist.ProcessGroup
Exchange = Callable[[Tensor, Group], Tensor]


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
    """One rank's part of a parameter, with its place in the whole.

    `whole` is the shape of the uncut parameter, cut along axis `cut` into tp parts; with `pieces` 2 it is two stacked matrices
    (gate and up), each cut for itself. `init`: the deviation of its random start; 0 for zeros, None for ones.
    `layer` and `expert` are counted over the whole model. `shared` is the embedding that is the output layer too.
    """

    whole: tuple[int, ...]
    cut: int | None
    pieces: int
    init: float | None
    layer: int | None = None
    expert: int | None = None
    shared: bool = False

    def part(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank holds of a whole tensor."""
        if self.cut is None:
            return whole
        return torch.cat([half.chunk(ranks, self.cut)[rank] for half in whole.chunk(self.pieces, self.cut)], self.cut)


def weight(
    grid: Grid, shape: tuple[int, ...], cut: int | None = None, pieces: int = 1, init: float | None = 0.02
) -> Weight:
    local = [n // grid.tp if axis == cut else n for axis, n in enumerate(shape)]
    made = Weight(torch.empty(local, dtype=grid.config.training.compute))
    made.whole, made.cut, made.pieces, made.init = shape, cut, pieces, init
    return made


class _Pair(torch.autograd.Function):
    """One exchange between ranks on the way forward, and the one that gradients need on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: Exchange, back: Exchange) -> Tensor:
        ctx.back, ctx.group = back, group
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad, ctx.group), None, None, None


def _same(x: Tensor, group: Group) -> Tensor:
    return x


def _sum(x: Tensor, group: Group) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _stack(x: Tensor, group: Group) -> Tensor:
    parts = [torch.empty(x.shape, dtype=x.dtype) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _own_of_sum(x: Tensor, group: Group) -> Tensor:
    return _sum(x, group).chunk(group.size())[group.rank()]


def _pair(x: Tensor, group: Group, there: Exchange, back: Exchange) -> Tensor:
    if group.size() == 1:
        return x
    return _Pair.apply(x, group, there, back)  # type: ignore[no-any-return, no-untyped-call]


def copy(x: Tensor, grid: Grid) -> Tensor:
    """Into a column-parallel layer: the same input on every rank, so its gradients add up."""
    return _pair(x, grid.tensor, _same, _sum)


def reduce(x: Tensor, grid: Grid) -> Tensor:
    """Out of a row-parallel layer: outputs add up, and every rank gets the whole gradient."""
    return _pair(x, grid.tensor, _sum, _same)


def gather_tokens(x: Tensor, grid: Grid) -> Tensor:
    """The tokens of all expert ranks, so that each can pick those its experts are to see."""
    return _pair(x, grid.expert, _stack, _own_of_sum)


def scatter_tokens(x: Tensor, grid: Grid) -> Tensor:
    """The way back: what all experts made of this rank's tokens."""
    return _pair(x, grid.expert, _own_of_sum, _stack)


class _Linear(nn.Module):
    """What Megatron's linears have in common: each has an (empty) extra state, and so a key in the checkpoint."""

    def __init__(self, grid: Grid, matrix: Weight, bias: Weight | None) -> None:
        super().__init__()
        self.grid, self.bias = grid, bias
        self.weight: Weight | None = matrix

    def get_extra_state(self) -> None: ...

    def set_extra_state(self, state: object) -> None: ...


class ColumnParallel(_Linear):
    """Rows of the weight are cut, and so are its outputs. A tied output layer has no rows and is given the embedding's."""

    def __init__(self, grid: Grid, inputs: int, outputs: int, *, bias: bool = False, pieces: int = 1) -> None:
        rows = weight(grid, (outputs, inputs), 0, pieces)
        super().__init__(grid, rows, weight(grid, (outputs,), 0, pieces, init=0.0) if bias else None)

    def forward(self, x: Tensor, tied: Tensor | None = None) -> Tensor:
        rows = self.weight if tied is None else tied
        assert rows is not None
        return F.linear(copy(x, self.grid), rows, self.bias)


class RowParallel(_Linear):
    """Columns of the weight are cut, as its inputs are; the bias is whole and added once, after the sum."""

    def __init__(self, grid: Grid, inputs: int, outputs: int, *, bias: bool = False) -> None:
        columns = weight(grid, (outputs, inputs), 1, init=0.02 / (2 * grid.config.model.layers) ** 0.5)
        super().__init__(grid, columns, weight(grid, (outputs,), init=0.0) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        y = reduce(F.linear(x, self.weight), self.grid)
        return y if self.bias is None else y + self.bias


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
