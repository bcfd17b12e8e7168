"""The decoder: attention, MLP, mixture of experts, and the part of the model that one pipeline stage holds.

Modules are named, and their parameters ordered, as in Megatron-Core's models of local layers: that is the checkpoint's format.
Activations are [sequence, batch, hidden].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ckptconv.trainer import parallel
from ckptconv.trainer.config import Config
from ckptconv.trainer.parallel import ColumnParallel, Grid, Head, RowParallel, VocabParallelEmbedding, Weight, weight

Batch = Mapping[str, Tensor]


class RMSNorm(nn.Module):
    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.weight = weight(config, (size,), init=None)
        self.eps = config.model.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


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
        self, config: Config, grid: Grid, hidden: int, heads: int, kv_heads: int, *, causal: bool, qkv_bias: bool,
        bias: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.groups, self.queries = hidden // heads, kv_heads // grid.tp, heads // kv_heads
        self.causal, self.theta = causal, config.model.rope_theta
        self.linear_proj = RowParallel(config, grid, hidden, hidden, bias=bias)
        self.linear_qkv = ColumnParallel(config, grid, hidden, (heads + 2 * kv_heads) * self.size, bias=qkv_bias)

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
    """SwiGLU. Each rank's linear_fc1 is [gate; up] of its own share."""

    def __init__(self, config: Config, grid: Grid) -> None:
        super().__init__()
        m = config.model
        self.linear_fc1 = ColumnParallel(config, grid, m.hidden, 2 * m.ffn, pieces=2)
        self.linear_fc2 = RowParallel(config, grid, m.ffn, m.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear_fc1(x).chunk(2, -1)
        return self.linear_fc2(F.silu(gate) * up)  # type: ignore[no-any-return]


class Router(nn.Module):
    """How much of each expert a token gets: softmax over the logits of its topk, zero for others."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = weight(config, (config.model.experts, config.model.hidden))
        self.topk = config.model.topk

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight)
        best, which = logits.topk(self.topk, -1)
        return torch.zeros_like(logits).scatter(-1, which, best.softmax(-1))


class Experts(nn.Module):
    def __init__(self, config: Config, grid: Grid) -> None:
        super().__init__()
        held = config.model.experts // grid.ep
        self.first = grid.ep_rank * held
        self.local_experts = nn.ModuleList(MLP(config, grid) for _ in range(held))
        for number, expert in enumerate(self.local_experts, self.first):
            for w in weights_of(expert):
                w.expert = number

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.local_experts, self.first):
            mine = share[:, number].detach().nonzero()[:, 0]
            total = total.index_add(0, mine, expert(x[mine]) * share[mine, number, None])
        return total


class MixtureOfExperts(nn.Module):
    """Every expert rank sees the tokens of all of them, computes its experts' part, and the parts are summed."""

    def __init__(self, config: Config, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.router = Router(config)
        self.experts = Experts(config, grid)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        share = self.router(tokens)
        out = self.experts(parallel.gather_tokens(tokens, self.grid), parallel.gather_tokens(share, self.grid))
        return parallel.scatter_tokens(out, self.grid).view_as(x)


class Layer(nn.Module):
    def __init__(self, config: Config, grid: Grid, number: int) -> None:
        super().__init__()
        m = config.model
        self.dropout = m.dropout
        self.input_layernorm = RMSNorm(config, m.hidden)
        self.self_attention = Attention(
            config, grid, m.hidden, m.heads, m.kv_heads, causal=True, qkv_bias=m.qkv_bias, bias=False
        )
        self.pre_mlp_layernorm = RMSNorm(config, m.hidden)
        self.mlp = MixtureOfExperts(config, grid) if m.experts else MLP(config, grid)
        for w in weights_of(self):
            w.layer = number

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attention(self.input_layernorm(x)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), self.dropout, self.training)


class Embedding(nn.Module):
    def __init__(self, config: Config, grid: Grid) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config, grid)
        self.word_embeddings.weight.shared = config.model.tied


class Decoder(nn.Module):
    def __init__(self, config: Config, grid: Grid, layers: range, last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, grid, number) for number in layers)
        if last:
            self.final_layernorm = RMSNorm(config, config.model.hidden)


class Stage(nn.Module):
    """The layers of virtual stage `number` of a language model, with the embedding if it is the first, the head if the last.

    A tied model with several stages has the shared weight twice, on the first and the last; with one stage the head has none.
    """

    def __init__(self, config: Config, grid: Grid, number: int) -> None:
        super().__init__()
        stages = config.layout.pp * config.layout.vpp
        per = config.model.layers // stages
        self.grid, self.first, self.last = grid, number == 0, number == stages - 1
        if self.first:
            self.embedding = Embedding(config, grid)
        self.decoder = Decoder(config, grid, range(number * per, (number + 1) * per), self.last)
        if self.last:
            self.output_layer = Head(config, grid, tied=config.model.tied and self.first)
            if self.output_layer.weight is not None:
                self.output_layer.weight.shared = config.model.tied

    def embed(self, batch: Batch) -> Tensor:
        return self.embedding.word_embeddings(batch["tokens"].t())  # type: ignore[no-any-return]

    def forward(self, x: Tensor | None, batch: Batch) -> Tensor:
        """Hidden states for the next stage; from the last stage the loss, or logits [sequence, batch, vocab / tp] without labels."""
        x = self.embed(batch) if x is None else x
        for layer in self.decoder.layers:
            x = layer(x)
        if not self.last:
            return x
        tied = self.embedding.word_embeddings.weight if self.output_layer.weight is None else None
        logits = self.output_layer(self.decoder.final_layernorm(x), tied)
        if "labels" not in batch:
            return logits  # type: ignore[no-any-return]
        labels, mask = batch["labels"].t(), batch["loss_mask"].t()
        losses = parallel.vocab_parallel_loss(logits[-labels.shape[0] :], labels, self.grid)
        return (losses * mask).sum() / mask.sum()


def weights_of(module: nn.Module) -> Iterator[Weight]:
    for _, w in named_weights(module):
        yield w


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
