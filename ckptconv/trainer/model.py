"""The decoder: attention, MLP, mixture of experts, and the part of the model that one pipeline stage holds.

Modules are named, and their parameters ordered, as in Megatron-Core's models of local layers: that is the checkpoint's format.
Activations are [sequence, batch, hidden].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ckptconv.trainer import parallel
from ckptconv.trainer.parallel import ColumnParallel, Grid, RowParallel, VocabParallelEmbedding, Weight, weight

Batch = Mapping[str, Tensor]


class Norm(nn.Module):
    """RMSNorm, or LayerNorm if it has a bias."""

    def __init__(self, grid: Grid, size: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = weight(grid, (size,), init=None)
        self.bias = weight(grid, (size,), init=0.0) if bias else None
        self.eps = eps

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

    def __init__(
        self, grid: Grid, hidden: int, heads: int, kv_heads: int, *, causal: bool, qkv_bias: bool, bias: bool
    ) -> None:
        super().__init__()
        self.size, self.groups, self.queries = hidden // heads, kv_heads // grid.tp, heads // kv_heads
        self.causal, self.theta = causal, grid.config.model.rope_theta
        self.linear_proj = RowParallel(grid, hidden, hidden, bias=bias)
        self.linear_qkv = ColumnParallel(grid, hidden, (heads + 2 * kv_heads) * self.size, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, _ = x.shape
        groups = self.linear_qkv(x).view(length, batch, self.groups, self.queries + 2, self.size)
        q, k, v = groups.split([self.queries, 1, 1], 3)
        q, k, v = (t.reshape(length, batch, -1, self.size) for t in (q, k, v))
        if self.causal:
            q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (t.repeat_interleave(self.queries, 2) for t in (k, v))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.linear_proj(out.permute(2, 0, 1, 3).reshape(length, batch, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linears with an activation between. A gated one has no biases; its linear_fc1 is [gate; up] of each rank's share."""

    def __init__(
        self,
        grid: Grid,
        inputs: int,
        ffn: int,
        outputs: int,
        activation: Callable[[Tensor], Tensor],
        *,
        gated: bool = False,
    ) -> None:
        super().__init__()
        pieces = 2 if gated else 1
        self.linear_fc1 = ColumnParallel(grid, inputs, pieces * ffn, bias=not gated, pieces=pieces)
        self.linear_fc2 = RowParallel(grid, ffn, outputs, bias=not gated)
        self.activation, self.gated = activation, gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_fc1(x)
        if not self.gated:
            return self.linear_fc2(self.activation(x))  # type: ignore[no-any-return]
        gate, up = x.chunk(2, -1)
        return self.linear_fc2(self.activation(gate) * up)  # type: ignore[no-any-return]


def swiglu(grid: Grid) -> MLP:
    m = grid.config.model
    return MLP(grid, m.hidden, m.ffn, m.hidden, F.silu, gated=True)


class Router(nn.Module):
    """How much of each expert a token gets: softmax over the logits of its topk, zero for others."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        m = grid.config.model
        self.weight, self.topk = weight(grid, (m.experts, m.hidden)), m.topk

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight)
        best, which = logits.topk(self.topk, -1)
        return torch.zeros_like(logits).scatter(-1, which, best.softmax(-1))


class Experts(nn.Module):
    """The experts of this rank, counted from `first`."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        held = grid.config.model.experts // grid.ep
        self.first = grid.ep_rank * held
        self.local_experts = nn.ModuleList(swiglu(grid) for _ in range(held))
        for number, expert in enumerate(self.local_experts, self.first):
            for _, w in named_weights(expert):
                w.expert = number

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.local_experts, self.first):
            mine = share[:, number].detach().nonzero()[:, 0]
            total = total.index_add(0, mine, expert(x[mine]) * share[mine, number, None])
        return total


class MixtureOfExperts(nn.Module):
    """Every expert rank sees the tokens of all of them, computes its experts' part, and the parts are summed."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid, self.router, self.experts = grid, Router(grid), Experts(grid)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        share = self.router(tokens)
        out = self.experts(parallel.gather_tokens(tokens, self.grid), parallel.gather_tokens(share, self.grid))
        return parallel.scatter_tokens(out, self.grid).view_as(x)


class Layer(nn.Module):
    """Layer `number` of the whole model or tower."""

    def __init__(
        self, number: int, norms: tuple[Norm, Norm], attention: Attention, mlp: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.input_layernorm, self.self_attention, self.pre_mlp_layernorm, self.mlp = norms[0], attention, norms[1], mlp
        self.dropout = dropout
        for _, w in named_weights(self):
            w.layer = number

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attention(self.input_layernorm(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), self.dropout, self.training)


def language_layer(grid: Grid, number: int) -> Layer:
    m = grid.config.model
    norms = Norm(grid, m.hidden, m.norm_eps), Norm(grid, m.hidden, m.norm_eps)
    attention = Attention(grid, m.hidden, m.heads, m.kv_heads, causal=True, qkv_bias=m.qkv_bias, bias=False)
    return Layer(number, norms, attention, MixtureOfExperts(grid) if m.experts else swiglu(grid), m.dropout)


class Decoder(nn.Module):
    """Layers one after the other; Megatron calls those of a vision tower a decoder too."""

    def __init__(self, layers: Iterable[Layer], norm: Norm | None = None) -> None:
        super().__init__()
        self.layers, self.final_layernorm = nn.ModuleList(layers), norm

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
        layers = (language_layer(grid, n) for n in range(number * per, (number + 1) * per))
        self.decoder = Decoder(layers, Norm(grid, m.hidden, m.norm_eps) if self.last else None)
        if self.last:
            self.output_layer = ColumnParallel(grid, m.hidden, m.vocab)
            if m.tied and self.first:
                self.output_layer.weight = None
            elif self.output_layer.weight is not None:
                self.output_layer.weight.shared = m.tied

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
def initialize(module: nn.Module, grid: Grid, seed: int) -> None:
    """Random starts that are a function of the seed and the parameter's name in the whole model, so of no layout."""
    for name, w in named_weights(module):
        known_as = f"{seed}/{'shared' if w.shared else without_numbers(name)}/{w.layer}/{w.expert}"
        dice = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(known_as.encode()).digest()[:7], "little"))
        whole = torch.ones(w.whole) if w.init is None else torch.randn(w.whole, generator=dice) * w.init
        w.copy_(w.part(whole, grid.tp_rank, grid.tp))
