"""Hugging Face folders of any size that cost no disk: real headers and configs before weights that are holes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]
SHARD = 5 * 10**9


def llama(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> tuple[dict[str, Any], Shapes]:
    """config.json and every tensor of a Llama."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_sizes(layers, hidden, ffn, heads, kv_heads, vocab),
    }
    shapes = dict(_outer(hidden, vocab))
    for layer in range(layers):
        shapes |= _attention(layer, config)
        for name in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (ffn, hidden)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, ffn)
    return config, shapes


def mixtral(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, experts: int
) -> tuple[dict[str, Any], Shapes]:
    """config.json and every tensor of a Mixtral with its experts apart."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": 8,
        **_sizes(layers, hidden, ffn, heads, kv_heads, vocab),
    }
    shapes = dict(_outer(hidden, vocab))
    for layer in range(layers):
        shapes |= _attention(layer, config)
        moe = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{moe}.gate.weight"] = (experts, hidden)
        for e in range(experts):
            for name in ("w1", "w3"):
                shapes[f"{moe}.experts.{e}.{name}.weight"] = (ffn, hidden)
            shapes[f"{moe}.experts.{e}.w2.weight"] = (hidden, ffn)
    return config, shapes


def write(folder: Path, config: dict[str, Any], shapes: Shapes) -> Path:
    """The folder: shards of bf16 of at most 5 GB, an index, config.json."""
    folder.mkdir(parents=True)
    shards = list(_shards(shapes))
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, {tensor: shapes[tensor] for tensor in shard})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(map(nbytes, shapes.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _write_shard(path: Path, shapes: Shapes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes(shape)]}
        at += nbytes(shape)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def _shards(shapes: Shapes) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + nbytes(shape) > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes(shape)
    yield names


def _sizes(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 8192,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }


def _outer(hidden: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _attention(layer: int, config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    base = f"model.layers.{layer}."
    return {
        base + "input_layernorm.weight": (hidden,),
        base + "post_attention_layernorm.weight": (hidden,),
        base + "self_attn.q_proj.weight": (hidden, hidden),
        base + "self_attn.k_proj.weight": (kv, hidden),
        base + "self_attn.v_proj.weight": (kv, hidden),
        base + "self_attn.o_proj.weight": (hidden, hidden),
    }
