"""The decoder: attention, MLP, mixture of experts, and the part of the model that one pipeline stage holds.

Modules are named, and their parameters ordered, as in Megatron-Core's models of local layers: that is the checkpoint's format.
Activations are [sequence, batch, hidden].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ckptconv.trainer import parallel
from ckptconv.trainer.config import ModelConfig, VisionConfig
from ckptconv.trainer.parallel import COLUMN, ROW, Grid, Linear, VocabParallelEmbedding, Weight, weight

Batch = Mapping[str, Tensor]
Shape = ModelConfig | VisionConfig


class Norm(nn.Module):
    """RMSNorm; LayerNorm in a tower that sees."""

    def __init__(self, grid: Grid, c: Shape) -> None:
        super().__init__()
        self.weight = weight(grid, (c.hidden,), init=None)
        self.bias = weight(grid, (c.hidden,), init=0.0) if c.sees else None
        self.eps = c.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions, halves paired: x is [sequence, batch, head, size]."""
    length, size = x.shape[0], x.shape[-1]
    turns = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), turns)
    cos, sin = (torch.cat([t, t], -1)[:, None, None].to(x.dtype) for t in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Attention(nn.Module):
    """Rows of linear_qkv stand by key/value head: its queries, its key, its value. So a cut by rows is a cut by groups."""

    def __init__(self, grid: Grid, c: Shape) -> None:
        super().__init__()
        self.size, self.groups, self.queries = c.hidden // c.heads, c.kv_heads // grid.tp, c.heads // c.kv_heads
        self.theta = None if c.sees else grid.config.model.rope_theta  # what sees looks both ways, and knows its places
        rows, qkv_bias = (c.heads + 2 * c.kv_heads) * self.size, c.sees or grid.config.model.qkv_bias
        self.linear_proj = Linear(grid, ROW, c.hidden, c.hidden, bias=c.sees)
        self.linear_qkv = Linear(grid, COLUMN, c.hidden, rows, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, _ = x.shape
        groups = self.linear_qkv(x).view(length, batch, self.groups, self.queries + 2, self.size)
        q, k, v = groups.split([self.queries, 1, 1], 3)
        q, k, v = (t.reshape(length, batch, -1, self.size) for t in (q, k, v))
        if self.theta is not None:
            q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (t.repeat_interleave(self.queries, 2) for t in (k, v))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.theta is not None)
        return self.linear_proj(out.permute(2, 0, 1, 3).reshape(length, batch, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linears with an activation between; without one it is SwiGLU: no biases, linear_fc1 is [gate; up] of each rank's share."""

    def __init__(
        self, grid: Grid, inputs: int, ffn: int, outputs: int, activation: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        pieces, bias = (1, True) if activation else (2, False)
        self.linear_fc1 = Linear(grid, COLUMN, inputs, pieces * ffn, bias=bias, pieces=pieces)
        self.linear_fc2 = Linear(grid, ROW, ffn, outputs, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        first, *gated = self.linear_fc1(x).chunk(1 if self.activation else 2, -1)
        y = self.activation(first) if self.activation else F.silu(first) * gated[0]
        return self.linear_fc2(y)  # type: ignore[no-any-return]


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class MixtureOfExperts(nn.Module):
    """Every expert rank sees the tokens of all of them, computes its experts' part, and the parts are summed."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid, self.config = grid, grid.config.model
        held = self.config.experts // grid.ep
        self.router = nn.ParameterDict({"weight": weight(grid, (self.config.experts, self.config.hidden))})
        local = nn.ModuleList(MLP(grid, self.config.hidden, self.config.ffn, self.config.hidden) for _ in range(held))
        self.experts = nn.ModuleDict({"local_experts": local})
        self.numbered = list(enumerate(local, grid.ep_rank * held))
        for number, expert in self.numbered:
            for _, w in named_weights(expert):
                w.expert, w.spread = number, grid.ep > 1

    def forward(self, x: Tensor) -> Tensor:
        """A token's share of its topk experts is the softmax over their logits, of others zero."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = F.linear(tokens, self.router["weight"])
        best, which = logits.topk(self.config.topk, -1)
        share = parallel.gather_tokens(torch.zeros_like(logits).scatter(-1, which, best.softmax(-1)), self.grid)
        tokens = parallel.gather_tokens(tokens, self.grid)
        total = torch.zeros_like(tokens)
        for number, expert in self.numbered:
            mine = share[:, number].detach().nonzero()[:, 0]
            total = total.index_add(0, mine, expert(tokens[mine]) * share[mine, number, None])
        return parallel.scatter_tokens(total, self.grid).view_as(x)


class Layer(nn.Module):
    """Layer `number` of the whole model or tower."""

    def __init__(self, grid: Grid, c: Shape, number: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(grid, c)
        self.self_attention = Attention(grid, c)
        self.pre_mlp_layernorm = Norm(grid, c)
        mixed = not c.sees and grid.config.model.experts
        sizes = (c.hidden, c.ffn, c.hidden)
        self.mlp = MixtureOfExperts(grid) if mixed else MLP(grid, *sizes, quick_gelu if c.sees else None)
        self.dropout = 0.0 if c.sees else grid.config.model.dropout
        for _, w in named_weights(self):
            w.layer = number

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attention(self.input_layernorm(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Layers one after the other; Megatron calls those of a vision tower a decoder too."""

    def __init__(self, grid: Grid, c: Shape, numbers: range, *, norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(grid, c, number) for number in numbers)
        self.final_layernorm = Norm(grid, c) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.final_layernorm is None else self.final_layernorm(x)


class Stage(nn.Module):
    """The layers of virtual stage `number` of a language model, with the embedding if it is the first, the head if the last.

    A tied model with several stages has the shared weight twice, on the first and the last; with one stage the head has none.
    """

    def __init__(self, grid: Grid, number: int) -> None:
        super().__init__()
        m, at = grid.config.model, grid.config.layout
        per = m.layers // (at.pp * at.vpp)
        self.grid, self.first, self.last = grid, number == 0, number == at.pp * at.vpp - 1
        if self.first:
            self.embedding = nn.ModuleDict({"word_embeddings": VocabParallelEmbedding(grid)})
        self.decoder = Decoder(grid, m, range(number * per, (number + 1) * per), norm=self.last)
        if self.last:
            self.output_layer = Linear(grid, COLUMN, m.hidden, m.vocab)
            for _, w in named_weights(self.output_layer):
                w.shared = m.tied
            if m.tied and self.first:
                self.output_layer.weight = None

    def embed(self, batch: Batch) -> Tensor:
        return self.embedding["word_embeddings"](batch["tokens"].t())  # type: ignore[no-any-return]

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        """Hidden states for the next stage; from the last stage the loss, or logits [sequence, batch, vocab / tp] without labels."""
        x = self.decoder(self.embed(batch) if x is None else x)
        if not self.last:
            return x
        tied = self.embedding["word_embeddings"].weight if self.output_layer.weight is None else None
        logits: Tensor = self.output_layer(x, tied)
        if "labels" not in batch:
            return logits
        labels, mask = batch["labels"].t(), batch["loss_mask"].t()
        losses = parallel.vocab_parallel_loss(logits[-labels.shape[0] :], labels, self.grid)
        return (losses * mask).sum() / mask.sum()


def named_weights(module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """All parameters, in the order in which Megatron counts them."""
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, Weight), f"{name} does not say where it belongs"
        yield name, parameter


def without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


@torch.no_grad()
def initialize(module: nn.Module, grid: Grid) -> None:
    """Random starts that are a function of the seed and the parameter's name in the whole model, so of no layout; what is frozen is."""
    t = grid.config.training
    for name, w in named_weights(module):
        known_as = f"{t.seed}/{'shared' if w.shared else without_numbers(name)}/{w.layer}/{w.expert}"
        dice = torch.Generator().manual_seed(random.Random(known_as).getrandbits(56))
        whole = torch.ones(w.whole) if w.init is None else torch.randn(w.whole, generator=dice) * w.init
        if w.cut is not None:
            own = [piece.chunk(grid.tp, w.cut)[grid.tp_rank] for piece in whole.chunk(w.pieces, w.cut)]
            whole = torch.cat(own, w.cut)
        w.copy_(whole)
        w.requires_grad_(not name.startswith(t.freeze))
