"""Small Megatron-Core checkpoints, cut from whole weights by plain slices and saved by torch: nothing of ckptconv takes part."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYERS, HIDDEN, HEADS, GROUPS, DIM, FFN, ROWS, VOCAB, EXPERTS = 4, 16, 4, 2, 8, 24, 40, 37, 4
Edit = Callable[[dict[tuple[int, ...], dict[str, Any]]], object]


def weights(experts: int = 0) -> dict[str, Any]:
    """A whole model in the project's canonical names, with values that are all different."""
    g = torch.Generator().manual_seed(1)

    def new(*shape: int) -> Any:
        return torch.randn(*shape, generator=g)

    out = {"embed.weight": new(ROWS, HIDDEN), "head.weight": new(ROWS, HIDDEN), "norm.weight": new(HIDDEN)}
    for layer in range(LAYERS):
        p = f"layers.{layer}."
        out |= {p + "attn_norm.weight": new(HIDDEN), p + "mlp_norm.weight": new(HIDDEN)}
        out |= {p + "attn.q.weight": new(HEADS * DIM, HIDDEN), p + "attn.o.weight": new(HIDDEN, HEADS * DIM)}
        out |= {p + f"attn.{x}.weight": new(GROUPS * DIM, HIDDEN) for x in "kv"}
        for where in [f"moe.{e}." for e in range(experts)] or ["mlp."]:
            out |= {p + where + "gate.weight": new(FFN, HIDDEN), p + where + "up.weight": new(FFN, HIDDEN)}
            out |= {p + where + "down.weight": new(HIDDEN, FFN)}
        if experts:
            out[p + "moe.router.weight"] = new(experts, HIDDEN)
    return out


def fused_qkv(w: dict[str, Any], p: str) -> Any:
    """Group by group: its query heads, its key head, its value head."""
    rows = []
    per = HEADS // GROUPS * DIM
    for group in range(GROUPS):
        rows.append(w[p + "attn.q.weight"][group * per : (group + 1) * per])
        rows += [w[p + f"attn.{x}.weight"][group * DIM : (group + 1) * DIM] for x in "kv"]
    return torch.cat(rows)


def mlp(w: dict[str, Any], p: str, rank: int, n: int) -> tuple[Any, Any]:
    """A rank's fc1 (its part of gate, then of up) and fc2."""
    fc1 = torch.cat([w[p + f"{x}.weight"].chunk(n)[rank] for x in ("gate", "up")])
    return fc1, w[p + "down.weight"].chunk(n, 1)[rank].clone()


def layer_names(
    w: dict[str, Any], layer: int, local: int, tp: int, n: int, ep: int, eps: int, etp: int, impl: str
) -> dict[str, Any]:
    p, out = f"layers.{layer}.", dict[str, Any]()
    s = f"decoder.layers.{local}."
    te = impl == "te"
    out[s + ("self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight")] = w[
        p + "attn_norm.weight"
    ]
    out[s + "self_attention.linear_qkv.weight"] = fused_qkv(w, p).chunk(n)[tp].clone()
    out[s + "self_attention.linear_proj.weight"] = w[p + "attn.o.weight"].chunk(n, 1)[tp].clone()
    out[s + "self_attention.linear_proj._extra_state"] = None
    if p + "moe.router.weight" not in w:
        out[s + ("mlp.linear_fc1.layer_norm_weight" if te else "pre_mlp_layernorm.weight")] = w[p + "mlp_norm.weight"]
        out[s + "mlp.linear_fc1.weight"], out[s + "mlp.linear_fc2.weight"] = mlp(w, p + "mlp.", tp, n)
        return out
    out |= {
        s + "pre_mlp_layernorm.weight": w[p + "mlp_norm.weight"],
        s + "mlp.router.weight": w[p + "moe.router.weight"],
    }
    for i in range(EXPERTS // eps):
        fc1, fc2 = mlp(w, p + f"moe.{ep * (EXPERTS // eps) + i}.", tp % etp, etp)
        out |= {s + f"mlp.experts.linear_fc1.weight{i}": fc1, s + f"mlp.experts.linear_fc2.weight{i}": fc2}
    return out


def make_args(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS, "num_query_groups": GROUPS,
        "group_query_attention": True, "kv_channels": DIM, "max_position_embeddings": 64, "position_embedding_type": "rope",
        "rotary_base": 10000, "rotary_percent": 1.0, "normalization": "RMSNorm", "norm_epsilon": 1e-6, "swiglu": True,
        "add_bias_linear": False, "add_qkv_bias": False, "untie_embeddings_and_output_weights": True, "num_experts": None,
        "vocab_size": VOCAB, "padded_vocab_size": ROWS, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


def ends(w: dict[str, Any], t: int, tp: int, *, first: bool, last: bool) -> dict[str, Any]:
    """What the first and the last chunk of the pipeline have beside layers."""
    out = {"embedding.word_embeddings.weight": w["embed.weight"].chunk(tp)[t].clone()} if first else {}
    if last:
        out |= {"decoder.final_layernorm.weight": w["norm.weight"], "output_layer._extra_state": None}
        out["output_layer.weight"] = w["head.weight"].chunk(tp)[t].clone()
    return out


def make(
    folder: Path, *, tp: int = 2, pp: int = 2, vpp: int = 1, ep: int = 1, etp: int | None = None, experts: int = 0, impl: str = "te",
    counts: list[list[int]] | None = None, args: dict[str, Any] | None = None, edit: Edit | None = None, names: str = "{}",
) -> Path:  # fmt: skip
    """Rank files of a small model as Megatron saves them; `edit` may damage {(tp, pp, ep): saved} before it is written."""
    w, etp = weights(experts), etp or tp
    counts = counts or [[LAYERS // pp // vpp] * pp for _ in range(vpp)]
    starts, at = {}, 0
    for v, p in ((v, p) for v in range(vpp) for p in range(pp)):
        starts[v, p] = at
        at += counts[v][p]
    said: dict[str, Any] = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
    }
    said |= {"virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None, "num_experts": experts or None}
    namespace = make_args(**(said | (args or {}))) if args is None or "absent" not in args else None
    ranks: dict[tuple[int, ...], dict[str, Any]] = {}
    for t, e in sorted({(r % tp, r // etp % ep) for r in range(int(np.lcm(tp, ep * etp)))}):
        for p in range(pp):
            saved: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 7} | (
                {"args": namespace} if namespace else {}
            )
            for v in range(vpp):
                model: dict[str, Any] = {}
                for local in range(counts[v][p]):
                    model |= layer_names(w, starts[v, p] + local, local, t, tp, e, ep, etp, impl)
                model |= ends(w, t, tp, first=(v, p) == (0, 0), last=(v, p) == (vpp - 1, pp - 1))
                saved["model" if vpp == 1 else f"model{v}"] = model
            ranks[t, p, e] = saved
    if edit is not None:
        edit(ranks)
    for (t, p, e), saved in ranks.items():
        name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") + (f"_{e:03d}" if ep > 1 else "")
        path = folder / "iter_0000007" / name / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(saved, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def hf_config(folder: Path, **changes: Any) -> Path:
    """A Hugging Face config.json of the model made here."""
    experts = changes.pop("experts", 0)
    table = {
        "model_type": "mixtral" if experts else "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": DIM, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    table |= {"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(table | changes))
    return folder
