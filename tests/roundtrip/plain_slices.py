"""What Megatron's rank files must hold, worked out here from Hugging Face weights with plain torch slicing; no line of ckptconv is used."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Grid:
    """The layout a folder was asked to have; `stages` has the number of layers of each (virtual) stage, chunk 0 first."""

    tp: int
    stages: tuple[int, ...]
    pp: int = 1
    ep: int = 1
    etp: int | None = None

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """(tensor, expert, expert tensor) rank of every process of a stage: two gears over one row of processes."""
        etp = self.etp or self.tp
        for process in range(lcm(self.tp, self.ep * etp)):
            yield process % self.tp, process // etp % self.ep, process % etp

    def folder(self, t: int, p: int, e: int) -> str:
        return f"mp_rank_{t:02d}" + (f"_{p:03d}" if self.pp > 1 else "") + (f"_{e:03d}" if self.ep > 1 else "")

    def layers(self, p: int) -> Iterator[tuple[str, int, int]]:
        """(chunk, number in the chunk, number in the model) of every layer that pipeline rank p holds."""
        chunks = len(self.stages) // self.pp
        for chunk in range(chunks):
            stage = chunk * self.pp + p
            name = f"model{chunk}" if chunks > 1 else "model"
            for local in range(self.stages[stage]):
                yield name, local, sum(self.stages[:stage]) + local


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder, read with the safetensors library."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    @cached_property
    def tensors(self) -> Tensors:
        return read_safetensors(self.folder)

    def at(self, layer: int, name: str) -> torch.Tensor:
        return self.tensors[f"model.layers.{layer}.{name}"]

    def embedding(self, t: int, tp: int) -> torch.Tensor:
        """Rows added by repeating the last one up to a multiple of 128 for each rank, then shared out."""
        rows = self.tensors["model.embed_tokens.weight"]
        each = -(-len(rows) // (128 * tp)) * 128
        indices = torch.arange(t * each, (t + 1) * each).clamp(max=len(rows) - 1)
        return rows[indices]

    def qkv(self, layer: int, t: int, tp: int) -> torch.Tensor:
        """For each key/value head: the queries that use it, its key, its value. Equal shares of these rows, in order."""
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q, k, v = (self.at(layer, f"self_attn.{n}_proj.weight") for n in "qkv")
        dim, share = len(k) // groups, heads // groups
        rows = []
        for g in range(groups):
            rows += [q[h * dim : (h + 1) * dim] for h in range(g * share, (g + 1) * share)]
            rows += [k[g * dim : (g + 1) * dim], v[g * dim : (g + 1) * dim]]
        whole = torch.cat(rows)
        each = len(whole) // tp
        return whole[t * each : (t + 1) * each]

    def columns(self, layer: int, name: str, t: int, tp: int) -> torch.Tensor:
        whole = self.at(layer, name)
        each = whole.shape[1] // tp
        return whole[:, t * each : (t + 1) * each]

    def gate_up(self, layer: int, names: tuple[str, str], t: int, tp: int) -> torch.Tensor:
        """This rank's rows of gate, then its rows of up."""
        gate, up = (self.at(layer, name) for name in names)
        each = len(gate) // tp
        return torch.cat([gate[t * each : (t + 1) * each], up[t * each : (t + 1) * each]])


def check_ranks(folder: Path, model: Model, grid: Grid, *, legacy: bool = False) -> int:
    """Hold the attention, MLP, experts and embedding of every rank against the model; gives the number of tensors compared."""
    count = 0
    release = folder / f"iter_{int((folder / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    files = {grid.folder(t, p, e) for p in range(grid.pp) for t, e, _ in grid.ranks()}
    assert {path.name for path in release.iterdir()} == files
    for p in range(grid.pp):
        for t, e, x in grid.ranks():
            state = read_rank(release / grid.folder(t, p, e) / "model_optim_rng.pt")
            for chunk, local, layer in grid.layers(p):
                stored = _layer(state[chunk], local, legacy=legacy)
                wanted = _wanted(stored, model, grid, layer, (t, e, x))
                where = f"{folder.name} {grid.folder(t, p, e)} layer {layer}"
                for name, tensor in wanted.items():
                    assert torch.equal(stored[name], tensor), f"{where} {name}"
                count += len(wanted)
            if p == 0:
                assert torch.equal(_embedding(state, legacy=legacy), model.embedding(t, grid.tp))
    return count


def _embedding(state: dict[str, Any], *, legacy: bool) -> torch.Tensor:
    first = state["model" if "model" in state else "model0"]
    if legacy:
        first = first["language_model"]["embedding"]["word_embeddings"]
    rows: torch.Tensor = first["weight" if legacy else "embedding.word_embeddings.weight"]
    return rows


def _layer(chunk: dict[str, Any], local: int, *, legacy: bool) -> Tensors:
    """The tensors of one layer, without what stands before their names."""
    if legacy:
        chunk, prefix = chunk["language_model"]["encoder"], f"layers.{local}."
    else:
        prefix = f"decoder.layers.{local}."
    return {name.removeprefix(prefix): value for name, value in chunk.items() if name.startswith(prefix)}


def _wanted(stored: Tensors, model: Model, grid: Grid, layer: int, rank: tuple[int, int, int]) -> Tensors:
    t, e, x = rank
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    fc1, fc2 = "mlp.linear_fc1", "mlp.linear_fc2"
    if "self_attention.query_key_value.weight" in stored:
        qkv, proj = "self_attention.query_key_value", "self_attention.dense"
        fc1, fc2 = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    wanted = {
        f"{qkv}.weight": model.qkv(layer, t, grid.tp),
        f"{proj}.weight": model.columns(layer, "self_attn.o_proj.weight", t, grid.tp),
    }
    if "num_local_experts" in model.config:
        wanted["mlp.router.weight"] = model.at(layer, "block_sparse_moe.gate.weight")
        return wanted | _experts(stored, model, grid, layer, (e, x))
    wanted[f"{fc1}.weight"] = model.gate_up(layer, ("mlp.gate_proj.weight", "mlp.up_proj.weight"), t, grid.tp)
    wanted[f"{fc2}.weight"] = model.columns(layer, "mlp.down_proj.weight", t, grid.tp)
    return wanted


def _experts(stored: Tensors, model: Model, grid: Grid, layer: int, rank: tuple[int, int]) -> Tensors:
    """Whichever of the three forms of experts is stored: fc1 and fc2 of each, or all in two flat buffers."""
    (e, x), etp = rank, grid.etp or grid.tp
    each = model.config["num_local_experts"] // grid.ep
    fc1, fc2 = [], []
    for expert in range(e * each, (e + 1) * each):
        base = f"block_sparse_moe.experts.{expert}."
        fc1.append(model.gate_up(layer, (base + "w1.weight", base + "w3.weight"), x, etp))
        fc2.append(model.columns(layer, base + "w2.weight", x, etp))
    if (
        "mlp.experts.weight1" in stored
    ):  # used as weight1.view(experts, hidden, -1) and weight2.view(experts, -1, hidden)
        hidden = model.config["hidden_size"]
        weight1, weight2 = (torch.stack([w.t() for w in ws]) for ws in (fc1, fc2))
        return {
            "mlp.experts.weight1": weight1.reshape(hidden, -1),
            "mlp.experts.weight2": weight2.reshape(-1, hidden),
        }
    named = (
        "mlp.experts.{}.weight{}"
        if "mlp.experts.linear_fc1.weight0" in stored
        else "mlp.experts.local_experts.{1}.{0}.weight"
    )
    found = {named.format("linear_fc1", i): w for i, w in enumerate(fc1)}
    return found | {named.format("linear_fc2", i): w for i, w in enumerate(fc2)}


def read_rank(path: Path) -> dict[str, Any]:
    """A rank file as torch opens it when it trusts nothing but tensors and a Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def read_safetensors(folder: Path) -> Tensors:
    """Every weight of a folder, by the library that defines the format."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
