"""Every field of the `args` we write: its name, since when Megatron has it, where its value comes from, and the value.

These are all fields that load_args_from_checkpoint copies (0.9 to 0.16), that check_checkpoint_args compares, or that describe
the model and its layout beside them. Settings of a training run are not invented: Megatron takes those from its command line.
docs/formats/megatron-per-rank.md is the same table for readers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ckptconv.config import ModelConfig
from ckptconv.containers.pickled import TorchDType
from ckptconv.dtypes import DType
from ckptconv.megatron.stages import pipeline_args
from ckptconv.megatron.versions import Core, Version
from ckptconv.topology import Topology


@dataclass(frozen=True, slots=True)
class Subject:
    """What the args are about. `carried` are the source's own args, from which settings that no config states are kept;

    `written` is what of the training state is: optimizer, distributed (optimizer), rng.
    """

    config: ModelConfig
    topology: Topology
    core: Core
    dtype: DType
    divisor: int
    local: bool = False
    legacy: bool = False
    experts: str = ""
    ckpt_format: str = "torch"
    carried: dict[str, object] = field(default_factory=dict)
    written: frozenset[str] = frozenset()

    @property
    def world(self) -> int:
        return self.topology.pp * self.topology.processes_per_stage

    @property
    def scaling(self) -> dict[str, object]:
        return (self.config.rope.scaling if self.config.rope else None) or {}

    @property
    def scaling_kind(self) -> str:
        return self.config.rope.kind if self.config.rope else ""


Value = Callable[[Subject], object]


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    origin: str
    value: Value
    since: Version = (0, 9)


def whole(value: object) -> object:
    """A float without a fraction as the int that argparse would have made of it (rotary_base is of type int)."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _model(name: str, attribute: str) -> Field:
    return Field(name, f"architecture: {attribute}", lambda s: getattr(s.config, attribute))


def _constant(name: str, value: object, why: str, since: Version = (0, 9)) -> Field:
    return Field(name, why, lambda _: value, since)


def _carried(name: str, otherwise: Value, origin: str) -> Field:
    return Field(name, f"the source's args, else {origin}", lambda s: s.carried.get(name, otherwise(s)))


def _degree(name: str, degree: str, since: Version = (0, 9)) -> Field:
    return Field(name, f"layout: {degree}", lambda s: s.topology.degree(degree), since)


def _pipeline(name: str, otherwise: object = None, since: Version = (0, 9)) -> Field:
    return Field(
        name, "layout: the stage table", lambda s: pipeline_args(s.topology, s.core).get(name, otherwise), since
    )


def _if_moe(value: Value, otherwise: object) -> Value:
    return lambda s: value(s) if s.config.experts else otherwise


def layer_freq(config: ModelConfig) -> object:
    """The layers with experts as --moe-layer-freq says them: 1 for all of them, else a list."""
    if len(config.moe_layers) in (0, config.layers):
        return 1
    held = set(config.moe_layers)
    return [int(i in held) for i in range(config.layers)]


def moe_fields(config: ModelConfig) -> dict[str, object]:
    """What a TransformerConfig, of whatever wrapper, is told of the experts."""
    if not config.experts:
        return {"num_moe_experts": None}
    return {
        "num_moe_experts": config.experts,
        "moe_ffn_hidden_size": config.moe_ffn,
        "moe_router_topk": config.router_topk,
        "moe_router_pre_softmax": config.router_pre_softmax,
        "moe_layer_freq": layer_freq(config),
    }


MODEL = (
    _model("num_layers", "layers"),
    _model("encoder_num_layers", "layers"),
    _model("hidden_size", "hidden"),
    Field(
        "ffn_hidden_size",
        "architecture: ffn (moe_ffn where no layer is dense)",
        lambda s: s.config.ffn or s.config.moe_ffn,
    ),
    _model("num_attention_heads", "heads"),
    _constant("group_query_attention", True, "always: num_query_groups says how many groups"),
    _model("num_query_groups", "kv_heads"),
    _model("kv_channels", "head_dim"),
    _model("max_position_embeddings", "max_positions"),
    _carried("seq_length", lambda s: s.config.max_positions, "architecture: max_positions"),
    _carried("encoder_seq_length", lambda s: s.carried.get("seq_length", s.config.max_positions), "seq_length"),
    Field(
        "position_embedding_type",
        "architecture: rope or learned positions",
        lambda s: "rope" if s.config.rope else "learned_absolute",
    ),
    _constant(
        "add_position_embedding", True, "Megatron's default; False is a deprecated spelling that its own check compares"
    ),
    _constant("use_rotary_position_embeddings", False, "deprecated spelling of position_embedding_type"),
    Field("rotary_base", "architecture: rope base", lambda s: whole(s.config.rope.base) if s.config.rope else 10000),
    Field("rotary_percent", "architecture: rope percent", lambda s: s.config.rope.percent if s.config.rope else 1.0),
    _constant("rotary_interleaved", False, "rows are in rotate-half order"),
    Field(
        "rotary_seq_len_interpolation_factor",
        "architecture: linear rope scaling",
        lambda s: whole(s.scaling["factor"]) if s.scaling_kind == "linear" else None,
    ),
    Field("use_rope_scaling", "architecture: llama3 rope scaling", lambda s: s.scaling_kind == "llama3", (0, 10)),
    Field(
        "rope_scaling_factor",
        "architecture: llama3 rope scaling (Megatron's default 8.0 without one)",
        lambda s: float(str(s.scaling["factor"])) if s.scaling_kind == "llama3" else 8.0,
        (0, 11),
    ),
    Field(
        "window_size",
        "architecture: sliding window",
        lambda s: (s.config.sliding_window - 1, 0) if s.config.sliding_window else None,
        (0, 15),
    ),
    Field("add_bias_linear", "architecture: biases of every linear", lambda s: s.config.out_bias and s.config.mlp_bias),
    Field("add_qkv_bias", "architecture: qkv_bias alone", lambda s: s.config.qkv_bias and not s.config.out_bias),
    Field("swiglu", "architecture: activation", lambda s: s.config.glu and s.config.activation == "silu"),
    Field("squared_relu", "architecture: activation", lambda s: not s.config.glu and s.config.activation == "relu2"),
    Field("openai_gelu", "architecture: activation", lambda s: not s.config.glu and s.config.activation == "gelu_new"),
    Field("normalization", "architecture: norm", lambda s: "LayerNorm" if s.config.norm == "layernorm" else "RMSNorm"),
    _model("norm_epsilon", "norm_eps"),
    _constant("apply_layernorm_1p", False, "norm weights are stored as they are"),
    _constant("apply_residual_connection_post_layernorm", False, "pre-norm models only"),
    _constant("apply_query_key_layer_scaling", False, "an fp16 training aid"),
    _model("qk_layernorm", "qk_norm"),
    Field("untie_embeddings_and_output_weights", "architecture: tied", lambda s: not s.config.tied),
    _carried(
        "attention_dropout", lambda s: s.config.raw.get("attention_dropout", 0.0), "the Hugging Face config, else 0.0"
    ),
    _carried("hidden_dropout", lambda _: 0.0, "0.0: models from Hugging Face have none"),
    _constant("multi_latent_attention", False, "not supported", (0, 10)),
    _constant("spec", None, "the built-in layer spec"),
)

EXPERTS = (
    Field("num_experts", "architecture: experts (None: dense)", lambda s: s.config.experts or None),
    Field("moe_layer_freq", "architecture: moe_layers", lambda s: layer_freq(s.config), (0, 10)),
    Field(
        "moe_ffn_hidden_size",
        "architecture: moe_ffn (Megatron copies ffn for dense models)",
        lambda s: s.config.moe_ffn or s.config.ffn,
        (0, 10),
    ),
    Field(
        "moe_router_topk",
        "architecture: router_topk (Megatron's default 2 for dense models)",
        _if_moe(lambda s: s.config.router_topk, 2),
    ),
    _model("moe_router_pre_softmax", "router_pre_softmax"),
    _carried("moe_router_load_balancing_type", lambda _: "aux_loss", "Megatron's default"),
    _carried("moe_token_dispatcher_type", lambda _: "allgather", "Megatron's default"),
    Field(
        "moe_grouped_gemm",
        "form of the experts: te-grouped or grouped",
        _if_moe(lambda s: s.experts in ("te-grouped", "grouped"), False),  # Megatron asserts bf16 where it is True
    ),
    Field(
        "moe_use_legacy_grouped_gemm",
        "form of the experts: grouped",
        _if_moe(lambda s: s.experts == "grouped", False),
        (0, 11),
    ),
    _constant("moe_shared_expert_intermediate_size", None, "not supported", (0, 10)),
    _constant("moe_router_score_function", "softmax", "the only one supported", (0, 11)),
    _constant("moe_router_enable_expert_bias", False, "not supported", (0, 11)),
    _constant("moe_router_topk_scaling_factor", None, "not supported", (0, 11)),
    _constant("moe_latent_size", None, "not supported", (0, 16)),
)

UNUSED = (  # copied by the loader for other kinds of model: Megatron's defaults
    _constant("hybrid_attention_ratio", 0.0, "Megatron's default: not a hybrid model", (0, 10)),
    _constant("hybrid_mlp_ratio", 0.0, "Megatron's default: not a hybrid model", (0, 10)),
    _constant("hybrid_override_pattern", None, "not a hybrid model", (0, 10)),
    _constant("is_hybrid_model", False, "not a hybrid model", (0, 12)),
    _constant("mamba_state_dim", 128, "Megatron's default: not a hybrid model", (0, 12)),
    _constant("mamba_head_dim", 64, "Megatron's default: not a hybrid model", (0, 12)),
    _constant("mamba_num_groups", 8, "Megatron's default: not a hybrid model", (0, 12)),
    _constant("mamba_num_heads", None, "not a hybrid model", (0, 13)),
    _constant("heterogeneous_layers_config_path", None, "all layers alike", (0, 12)),
    _constant("heterogeneous_layers_config_encoded_json", None, "all layers alike", (0, 12)),
)

FILES = (
    Field("params_dtype", "dtype of the tensors", lambda s: TorchDType(s.dtype.torch)),
    Field("bf16", "dtype of the tensors", lambda s: s.dtype.name == "bf16"),
    Field("fp16", "dtype of the tensors", lambda s: s.dtype.name == "fp16"),
    Field("vocab_size", "true vocabulary (None: not known)", lambda s: s.config.vocab),
    Field("padded_vocab_size", "rows of the embedding", lambda s: s.config.vocab_rows),
    Field(
        "make_vocab_size_divisible_by",
        "--make-vocab-size-divisible-by, else the source's args, else 128",
        lambda s: s.divisor,
    ),
    _carried("tokenizer_type", lambda _: "HuggingFaceTokenizer", "HuggingFaceTokenizer: its files are in hf/"),
    _constant("tokenizer_model", None, "a path of another machine is of no use"),
    _constant("tiktoken_pattern", None, "no tiktoken vocabulary", (0, 10)),
    Field(
        "transformer_impl",
        "--saver.transformer-impl",
        lambda s: "local" if s.local or s.legacy else "transformer_engine",
    ),
    Field("use_legacy_models", "format: legacy or mcore", lambda s: s.legacy),
    Field("ckpt_format", "the format of these files", lambda s: s.ckpt_format),
    Field("use_dist_ckpt", "the format of these files", lambda s: s.ckpt_format != "torch"),
    Field("use_distributed_optimizer", "form of the optimizer state", lambda s: "distributed" in s.written),
    _carried("overlap_grad_reduce", lambda _: False, "Megatron's default: whether flat buffers have several buckets"),
    _carried("ddp_bucket_size", lambda _: None, "Megatron's default: how large these are"),
    Field(
        "no_save_optim",
        "whether there is optimizer state: Megatron else does not look for it",
        lambda s: "optimizer" not in s.written,
    ),
    Field(
        "no_save_rng",
        "whether there is RNG state: Megatron else does not look for it",
        lambda s: "rng" not in s.written,
    ),
    _constant("data_parallel_random_init", False, "Megatron's default; compared when loading"),
    _carried("consumed_train_samples", lambda _: 0, "0"),
    _carried("consumed_valid_samples", lambda _: 0, "0"),
    _carried("skipped_train_samples", lambda _: 0, "0"),
)

LAYOUT = (
    _degree("tensor_model_parallel_size", "tp"),
    _degree("pipeline_model_parallel_size", "pp"),
    _degree("transformer_pipeline_model_parallel_size", "pp"),
    Field(
        "virtual_pipeline_model_parallel_size",
        "layout: vpp (None for 1)",
        lambda s: s.topology.vpp if s.topology.vpp > 1 else None,
    ),
    _pipeline("num_layers_per_virtual_pipeline_stage"),
    _pipeline("num_virtual_stages_per_pipeline_rank", since=(0, 11)),
    _pipeline("decoder_first_pipeline_num_layers"),
    _pipeline("decoder_last_pipeline_num_layers"),
    _pipeline("account_for_embedding_in_pipeline_split", False, (0, 11)),
    _pipeline("account_for_loss_in_pipeline_split", False, (0, 11)),
    _pipeline("pipeline_model_parallel_layout", since=(0, 13)),
    _degree("expert_model_parallel_size", "ep"),
    _degree("expert_tensor_parallel_size", "etp", (0, 10)),
    _constant("context_parallel_size", 1, "has no trace in weights"),
    Field("world_size", "layout: processes that write a file", lambda s: s.world),
    Field("data_parallel_size", "layout: world_size / tp / pp", lambda s: s.world // (s.topology.tp * s.topology.pp)),
)

FIELDS = (*MODEL, *EXPERTS, *UNUSED, *FILES, *LAYOUT)
