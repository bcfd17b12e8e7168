"""A second way into the judge's models, without ckptconv: whole tensors from Hugging Face, cut by Megatron-Core's own sharding.

It shows that the judge judges (logits equal transformers'), and what each rank must hold, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.judge.judge import agreed, named, rank_folder
from tests.judge.models import Logits, build, logits
from tests.judge.ranks import Layout, run_ranks
from tests.judge.spec import Spec, spec_from_hf

Tensors = dict[str, torch.Tensor]
RankTensors = dict[str, dict[str, NDArray[Any]]]


def filled_logits(hf: Path, ids: torch.Tensor, layout: Layout, divisor: int = 128) -> Logits:
    config, whole = read_whole(hf, layout, divisor)

    def job() -> Logits | None:
        return logits(filled(spec_from_hf(config, layout.tp, divisor), layout, whole), ids)

    return agreed(layout, job)[..., : config["vocab_size"]]


def filled_states(hf: Path, layout: Layout, divisor: int = 128) -> dict[str, RankTensors]:
    """rank folder -> chunk ("model", or "model0" …) -> name -> values: the files Megatron-Core would save."""
    config, whole = read_whole(hf, layout, divisor)

    def job() -> tuple[str, RankTensors]:
        return rank_folder(layout), states(filled(spec_from_hf(config, layout.tp, divisor), layout, whole))

    return dict(run_ranks(layout, job))


def states(chunks: list[Any]) -> RankTensors:
    """What this rank's models hold."""
    return {name: _plain(chunk.state_dict()) for name, chunk in named(chunks).items()}


def _plain(state: dict[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: value.numpy() for name, value in state.items() if isinstance(value, torch.Tensor)}


def read_whole(hf: Path, layout: Layout, divisor: int) -> tuple[dict[str, Any], Tensors]:
    from safetensors.torch import load_file

    config = json.loads((hf / "config.json").read_text())
    stored: Tensors = {}
    for path in sorted(hf.glob("*.safetensors")):
        stored.update(load_file(path))
    return config, whole_tensors(stored, spec_from_hf(config, layout.tp, divisor))


def filled(spec: Spec, layout: Layout, whole: Tensors) -> list[Any]:
    chunks = build(spec, layout)
    for chunk in chunks:
        state = {name: _cut(entry, whole) for name, entry in chunk.sharded_state_dict().items()}
        chunk.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=True)
    return chunks


def _cut(entry: Any, whole: Tensors) -> Any:
    """One entry of a sharded state dict as this rank's tensor, by the slices Megatron-Core gives."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories

    if isinstance(entry, ShardedTensorFactory):
        holder = {"entry": entry}
        apply_factories(holder)
        return entry.merge_fn(_each(holder["entry"], lambda e: _cut(e, whole)))
    if isinstance(entry, ShardedTensor):
        return whole[entry.key][entry.global_slice()].clone()
    return None


def _each(tree: Any, fn: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {key: _each(value, fn) for key, value in tree.items()}
    return [_each(value, fn) for value in tree] if isinstance(tree, list) else fn(tree)


def whole_tensors(hf: Tensors, spec: Spec) -> Tensors:
    """Megatron-Core's global tensors: layers stacked on a first axis, experts on a second, vocabulary padded."""
    layer = "decoder.layers."
    whole = {
        "embedding.word_embeddings.weight": _padded(hf["model.embed_tokens.weight"], spec.vocab_rows),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        layer + "self_attention.linear_qkv.layer_norm_weight": _stacked(hf, spec, "input_layernorm.weight"),
        layer + _second_norm(spec): _stacked(hf, spec, "post_attention_layernorm.weight"),
        layer + "self_attention.linear_proj.weight": _stacked(hf, spec, "self_attn.o_proj.weight"),
        layer + "self_attention.linear_qkv.weight": _qkv(hf, spec, "weight"),
    }
    if not spec.tied:
        whole["output_layer.weight"] = _padded(hf["lm_head.weight"], spec.vocab_rows)
    if spec.qkv_bias or spec.bias:
        whole[layer + "self_attention.linear_qkv.bias"] = _qkv(hf, spec, "bias")
    if spec.bias:
        whole[layer + "self_attention.linear_proj.bias"] = _stacked(hf, spec, "self_attn.o_proj.bias")
    for name in ("q", "k") if spec.qk_norm else ():
        whole[layer + f"self_attention.{name}_layernorm.weight"] = _stacked(hf, spec, f"self_attn.{name}_norm.weight")
    return whole | (_experts(hf, spec) if spec.experts else _dense(hf, spec))


def _second_norm(spec: Spec) -> str:
    return "pre_mlp_layernorm.weight" if spec.experts else "mlp.linear_fc1.layer_norm_weight"


def _dense(hf: Tensors, spec: Spec) -> Tensors:
    found = {}
    for kind in ("weight", "bias") if spec.bias else ("weight",):
        gate, up, down = (_stacked(hf, spec, f"mlp.{n}_proj.{kind}") for n in ("gate", "up", "down"))
        found[f"decoder.layers.mlp.linear_fc1.{kind}"] = torch.cat([gate, up], 1)
        found[f"decoder.layers.mlp.linear_fc2.{kind}"] = down
    return found


def _experts(hf: Tensors, spec: Spec) -> Tensors:
    def all_of(name: str) -> torch.Tensor:
        each = [_stacked(hf, spec, f"block_sparse_moe.experts.{e}.{name}.weight") for e in range(spec.experts or 0)]
        return torch.stack(each, 1)

    experts = "decoder.layers.mlp.experts.experts."
    return {
        "decoder.layers.mlp.router.weight": _stacked(hf, spec, "block_sparse_moe.gate.weight"),
        experts + "linear_fc1.weight": torch.cat([all_of("w1"), all_of("w3")], 2),
        experts + "linear_fc2.weight": all_of("w2"),
    }


def _stacked(hf: Tensors, spec: Spec, name: str) -> torch.Tensor:
    return torch.stack([hf[f"model.layers.{i}.{name}"] for i in range(spec.layers)])


def _qkv(hf: Tensors, spec: Spec, kind: str) -> torch.Tensor:
    """Group by group: the queries of a key/value head, its key, its value."""
    q, k, v = (_stacked(hf, spec, f"self_attn.{n}_proj.{kind}") for n in "qkv")
    parts = [t.reshape(spec.layers, spec.groups, -1, *t.shape[2:]) for t in (q, k, v)]
    return torch.cat(parts, 2).flatten(1, 2)


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Megatron's converters repeat the last row."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), -1)])


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))
