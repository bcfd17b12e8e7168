"""Megatron-Core GPT models of one rank (one per virtual stage) built from a Spec, and their logits over all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from tests.judge.ranks import Layout
from tests.judge.spec import Spec

Logits = NDArray[np.float32]


def build(spec: Spec, layout: Layout) -> list[Any]:
    """This rank's model chunks, weights not yet loaded (NaN, so that a parameter left out shows)."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel

    config, layer = _config(spec, layout), _layer(spec)
    chunks = []
    for stage in range(layout.vpp or 1):
        place: dict[str, Any] = {"vp_stage": stage} if layout.vpp else {}  # 0.12 does not know the word
        virtual = {"ignore_virtual": False, **place}
        chunk = GPTModel(
            config,
            layer,
            vocab_size=spec.vocab_rows,
            max_sequence_length=spec.positions,
            pre_process=ps.is_pipeline_first_stage(**virtual),
            post_process=ps.is_pipeline_last_stage(**virtual),
            parallel_output=True,
            position_embedding_type="rope",
            rotary_base=spec.rotary_base,
            rope_scaling=spec.rope_factor is not None,
            rope_scaling_factor=spec.rope_factor or 8.0,
            share_embeddings_and_output_weights=spec.tied,
            **place,
        )
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))
        chunks.append(chunk.eval())
    config.bf16 = spec.bf16 or spec.grouped_experts  # GroupedMLP asserts it and does not use it
    return chunks


def _layer(spec: Spec) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(
        num_experts=spec.experts,
        moe_grouped_gemm=spec.grouped_experts,
        qk_layernorm=spec.qk_norm,
        normalization="RMSNorm",
    )
    if spec.experts:
        # The local modules would name the norm before experts `mlp.linear_fc1.layer_norm_weight` in a distributed checkpoint,
        # where those of TransformerEngine, which real runs have, keep `pre_mlp_layernorm.weight`. Other names are the same.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


def _config(spec: Spec, layout: Layout) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe: dict[str, Any] = {
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.top_k,
        "moe_ffn_hidden_size": spec.ffn,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": spec.grouped_experts,
    }
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_query_groups=spec.groups,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn,
        layernorm_epsilon=spec.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=spec.bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        **_parallel(layout),
        **_dtypes(spec),
        **_on_a_cpu(),
        **(moe if spec.experts else {}),
    )


def _parallel(layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "num_layers_in_first_pipeline_stage": layout.first,
        "num_layers_in_last_pipeline_stage": layout.last,
        **({"pipeline_model_parallel_layout": layout.stages} if layout.stages else {}),  # unknown to 0.12
        "account_for_embedding_in_pipeline_split": layout.count_embedding,
        "account_for_loss_in_pipeline_split": layout.count_loss,
    }


def _dtypes(spec: Spec) -> dict[str, Any]:
    dtype = torch.bfloat16 if spec.bf16 else torch.float32
    return {"bf16": spec.bf16, "params_dtype": dtype, "pipeline_dtype": dtype}


def _on_a_cpu() -> dict[str, Any]:
    """Switches that choose plain torch code over fused kernels, and exactness over speed."""
    fused = ("gradient_accumulation", "masked_softmax", "bias_activation", "bias_dropout")
    return {
        **{f"{name}_fusion": False for name in fused},
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "use_cpu_initialization": True,
        "perform_initialization": True,  # it also marks which parameters are cut, which the norm of gradients needs
        "attention_softmax_in_fp32": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def logits(chunks: list[Any], ids: torch.Tensor) -> Logits | None:
    """[batch, position, vocabulary row] on ranks of the last stage, None elsewhere; hidden states go from stage to stage."""
    from megatron.core import parallel_state as ps

    ranks = dist.get_process_group_ranks(ps.get_pipeline_model_parallel_group())
    here, last = ps.get_pipeline_model_parallel_rank(), len(ranks) - 1
    batch, length = ids.shape
    positions = torch.arange(length)[None].expand(batch, -1)
    out = None
    for number, chunk in enumerate(chunks):
        if here > 0 or (number > 0 and last > 0):
            hidden = torch.empty(length, batch, chunk.config.hidden_size)
            dist.recv(hidden, ranks[here - 1])
            chunk.set_input_tensor(hidden)
        elif number > 0:
            chunk.set_input_tensor(out)
        out = chunk(ids, positions, None)
        if last > 0 and (here < last or number + 1 < len(chunks)):
            dist.send(out.contiguous(), ranks[(here + 1) % len(ranks)])
    return _gathered(out) if here == last else None


def _gathered(out: torch.Tensor | None) -> Logits:
    from megatron.core import parallel_state as ps

    assert out is not None
    parts = [torch.empty_like(out) for _ in range(ps.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, out.contiguous(), group=ps.get_tensor_model_parallel_group())
    return torch.cat(parts, -1).float().numpy()
