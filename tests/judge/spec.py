"""What Megatron-Core must be told of a model, read from a Hugging Face config or from the `args` that travel in a checkpoint."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from tests.judge.ranks import Layout

Config = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """The arguments of TransformerConfig and GPTModel that differ between the models judged here."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocab_rows: int
    positions: int
    norm_eps: float
    rotary_base: int
    rope_factor: float | None
    tied: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    experts: int | None
    top_k: int
    grouped_experts: bool = False
    bf16: bool = False


def spec_from_hf(config: Config, tp: int = 1, divisor: int = 128) -> Spec:
    """From a config.json of Llama, Mistral, Qwen2, Qwen3 or Mixtral, in the words of transformers 4 or 5."""
    kind, heads, rope = config["model_type"], config["num_attention_heads"], config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    multiple = divisor * tp
    return Spec(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn=config["intermediate_size"],
        vocab_rows=-(-config["vocab_size"] // multiple) * multiple,
        positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rotary_base=int(config.get("rope_theta") or rope.get("rope_theta") or 10000),
        rope_factor=scaling["factor"] if scaling.get("rope_type") == "llama3" else None,
        tied=bool(config.get("tie_word_embeddings")),
        bias=bool(config.get("mlp_bias")),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        experts=config.get("num_local_experts"),
        top_k=config.get("num_experts_per_tok", 2),
    )


def spec_from_args(args: Namespace) -> Spec:
    """As Megatron's own start-up reads them back from a checkpoint: nothing is filled in, a missing field is an error."""
    fixed = (args.normalization, args.position_embedding_type, args.swiglu, args.rotary_percent)
    assert fixed == ("RMSNorm", "rope", True, 1.0)
    return Spec(
        layers=args.num_layers,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        head_dim=args.kv_channels,
        ffn=args.moe_ffn_hidden_size if args.num_experts else args.ffn_hidden_size,
        vocab_rows=args.padded_vocab_size,
        positions=args.max_position_embeddings,
        norm_eps=args.norm_epsilon,
        rotary_base=args.rotary_base,
        rope_factor=args.rope_scaling_factor if args.use_rope_scaling else None,
        tied=not args.untie_embeddings_and_output_weights,
        bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        experts=args.num_experts,
        top_k=args.moe_router_topk if args.num_experts else 2,
    )


def layout_from_args(args: Namespace) -> Layout:
    """The parallel layout a checkpoint asks for, worked out as Megatron's `validate_args` does."""
    return Layout(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        vpp=_virtual_stages(args),
        first=args.decoder_first_pipeline_num_layers,
        last=args.decoder_last_pipeline_num_layers,
        stages=args.pipeline_model_parallel_layout,
        count_embedding=args.account_for_embedding_in_pipeline_split,
        count_loss=args.account_for_loss_in_pipeline_split,
    )


def _virtual_stages(args: Namespace) -> int | None:
    if args.pipeline_model_parallel_layout is not None:
        stages = len(args.pipeline_model_parallel_layout.split("|")) // args.pipeline_model_parallel_size
        return int(stages) if stages > 1 else None
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return int(args.num_virtual_stages_per_pipeline_rank)
    if args.num_layers_per_virtual_pipeline_stage is None:
        return None
    counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    layers: int = args.num_layers + counted
    return layers // int(args.pipeline_model_parallel_size) // int(args.num_layers_per_virtual_pipeline_stage)


def grouped(spec: Spec) -> Spec:
    """The same model with its experts in one GroupedMLP per rank (weight1, weight2)."""
    return replace(spec, grouped_experts=True)
