"""`run_config.yaml`: the model as Megatron-Bridge describes it beside a checkpoint that it loads."""

from __future__ import annotations

import yaml

from ckptconv.checkpoint import Stored
from ckptconv.config import ModelConfig
from ckptconv.dtypes import DType
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_table import moe_fields
from ckptconv.megatron.saving import Form

NAME = "run_config.yaml"
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
# what Megatron-Bridge may be told to call, by our name of the activation
ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    "gelu_pytorch_tanh": "megatron.core.activations.fast_gelu",
    "relu2": "megatron.core.activations.squared_relu",
}


def render(stored: Stored, form: Form, dtype: DType) -> bytes:
    """The file. Fields that are not named keep Megatron-Bridge's defaults, as when it makes the model itself."""
    model = {"_target_": PROVIDER, **_model(stored.config), **_precision(dtype), **_experts(stored.config, form)}
    saved = {"save_optim": False, "save_rng": False, "fully_parallel_save": True}
    return yaml.safe_dump({"checkpoint": saved, "model": model}, sort_keys=True).encode()


def _model(config: ModelConfig) -> dict[str, object]:
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError(
            f"--saver.run-config: no function is known for activation {config.activation!r}; known: {known}"
        )
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "ffn_hidden_size": config.ffn or config.moe_ffn,
        "num_attention_heads": config.heads,
        "num_query_groups": config.kv_heads,
        "kv_channels": config.head_dim,
        "normalization": "LayerNorm" if config.norm == "layernorm" else "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "gated_linear_unit": config.glu,
        "activation_func": {"_target_": ACTIVATIONS[config.activation], "_call_": False},
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "share_embeddings_and_output_weights": config.tied,
        "seq_length": config.max_positions,
        "vocab_size": config.vocab_rows,  # as stored: padded already
        "should_pad_vocab": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "window_size": [config.sliding_window - 1, 0] if config.sliding_window else None,
        **_rope(config),
    }


def _rope(config: ModelConfig) -> dict[str, object]:
    if config.rope is None:
        return {"position_embedding_type": "learned_absolute"}
    scaling, kind = config.rope.scaling or {}, config.rope.kind
    return {
        "position_embedding_type": "rope",
        "rotary_base": config.rope.base,
        "rotary_percent": config.rope.percent,
        "rope_scaling": kind == "llama3",
        "rope_scaling_factor": scaling.get("factor", 1.0) if kind == "llama3" else 1.0,
        "seq_len_interpolation_factor": scaling.get("factor") if kind == "linear" else None,
    }


def _precision(dtype: DType) -> dict[str, object]:
    kind = {"_target_": f"torch.{dtype.torch}", "_call_": False}
    return {
        "bf16": dtype.name == "bf16",
        "fp16": dtype.name == "fp16",
        "params_dtype": kind,
        "pipeline_dtype": dict(kind),
    }


def _experts(config: ModelConfig, form: Form) -> dict[str, object]:
    grouped = {"moe_grouped_gemm": form.experts == "te-grouped"} if config.experts else {}
    return moe_fields(config) | grouped
