"""`model_config.yaml` for a checkpoint we write: all that NeMo 2.0 needs to build and restore it, and what the source had besides."""

from __future__ import annotations

import copy
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from ckptconv.config import ModelConfig
from ckptconv.dtypes import DType
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_read import llama3_scaling
from ckptconv.megatron.args_table import layer_freq
from ckptconv.megatron.args_write import bias_problems
from ckptconv.nemo import neva_config, vocabulary, yaml_file
from ckptconv.nemo.model_config import ENDS, GATED
from ckptconv.nemo.settings import SETTINGS, TOKENIZER
from ckptconv.topology import Topology

DIVISOR = 128  # NeMo's own default of make_vocab_size_divisible_by
NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
UNGATED = {
    "gelu": ("gelu", False),
    "gelu_new": ("gelu", True),
    "gelu_pytorch_tanh": ("gelu", True),
    "relu2": ("squared-relu", False),
}
PRECISIONS: dict[str, object] = {"fp32": 32, "fp16": 16, "bf16": "bf16"}
_GATES = {ours: name for name, ours in GATED.items()}


@dataclass(frozen=True, slots=True)
class Form:
    """Which of NeMo's models the files are for. `megatron_legacy` and `gate_apart` are forms of legacy tensors."""

    mcore: bool = True
    transformer_engine: bool = True
    megatron_legacy: bool = False
    gate_apart: bool = False

    @property
    def variant(self) -> frozenset[str]:
        """The form of legacy tensors, in the words of nemo-legacy."""
        gate = "gate_apart" if self.gate_apart else "gate_joined"
        return frozenset({"qkv_v0" if self.megatron_legacy else "qkv_v2", gate})


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The `tokenizer` section to write, and how many tokens NeMo will find in it (None: not known)."""

    section: dict[str, object] = field(default_factory=dict)
    size: int | None = None


def write(
    config: ModelConfig,
    topology: Topology,
    form: Form,
    dtype: DType,
    tokenizer: Tokenizer,
    *,
    divisor: int = DIVISOR,
    carried: Dict[str, object] | None = None,
    encoder: neva_config.Encoder = neva_config.AS_SAID,
) -> bytes:
    """The file. `carried` is a NeMo source's own section: what says nothing of the model or these files is kept from it."""
    refuse_inexpressible(config, topology, form)
    if dtype.name not in PRECISIONS:
        raise ConfigError(
            f"NeMo has no precision for tensors of {dtype.name}; known: {', '.join(PRECISIONS)} (--dtype)"
        )
    settings: dict[str, object] = copy.deepcopy(dict(carried or SETTINGS))
    stated = {**_layout(topology), **_files(form, dtype, settings)}
    if config.kind == "text":
        stated |= {
            **_sizes(config, settings),
            **_block(config, form),
            **_positions(config),
            **_experts(config, topology),
        }
        stated |= _padding(config, topology.tp, divisor, tokenizer.size)
    for key, value in stated.items():
        if value is None and key in NEVER_NULL:
            settings.pop(key, None)
        elif value is not None or key in settings:
            settings[key] = value
    settings["tokenizer"] = tokenizer.section or settings.get("tokenizer") or dict(TOKENIZER)
    if config.kind == "text":
        _sequence_lengths(config, settings, fresh=not carried)
    neva_config.adapt(settings, config, encoder)
    return yaml_file.dump(settings)


# where NeMo takes a key that is there for a value that is meant
NEVER_NULL = (
    "override_vocab_size",
    vocabulary.KEY,
    "num_moe_experts",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_ffn_hidden_size",
    "moe_layer_freq",
)


def _sizes(config: ModelConfig, settings: Dict[str, object]) -> dict[str, object]:
    usual = config.hidden == config.heads * config.head_dim
    return {
        "max_position_embeddings": config.max_positions,
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "ffn_hidden_size": config.ffn or config.moe_ffn,
        "num_attention_heads": config.heads,
        "kv_channels": settings.get("kv_channels") and config.head_dim if usual else config.head_dim,
        "num_query_groups": config.kv_heads,
        "share_embeddings_and_output_weights": config.tied,
    }


def _block(config: ModelConfig, form: Form) -> dict[str, object]:
    if config.glu:
        name, openai = _GATES[config.activation], False
        name = name if form.gate_apart and not form.mcore else f"fast-{name}"
    else:
        name, openai = UNGATED[config.activation]
    only_qkv = config.qkv_bias and not config.out_bias
    return {
        "normalization": NORMS[config.norm],
        "layernorm_epsilon": config.norm_eps,
        "bias": config.out_bias,
        "qkv_bias": True if only_qkv else None,
        "activation": name,
        "openai_gelu": openai,
        "qk_layernorm": True if config.qk_norm else None,
        "window_size": [config.sliding_window - 1, 0] if config.sliding_window else None,
    }


def _positions(config: ModelConfig) -> dict[str, object]:
    if config.rope is None:
        return {"position_embedding_type": "learned_absolute", "scale_positional_embedding": None}
    scaling = config.rope.scaling or {}
    return {
        "position_embedding_type": "rope",
        "rotary_percentage": config.rope.percent,
        "rotary_base": config.rope.base,
        "seq_len_interpolation_factor": scaling.get("factor") if config.rope.kind == "linear" else None,
        "scale_positional_embedding": config.rope.kind == "llama3",
    }


def _experts(config: ModelConfig, topology: Topology) -> dict[str, object]:
    if not config.experts:
        return dict.fromkeys(
            ("num_moe_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size", "moe_layer_freq")
        )
    freq = layer_freq(config)
    return {
        "num_moe_experts": config.experts,
        "moe_router_topk": config.router_topk,
        "moe_router_pre_softmax": config.router_pre_softmax,
        "moe_ffn_hidden_size": config.moe_ffn if config.moe_ffn != (config.ffn or config.moe_ffn) else None,
        "moe_layer_freq": freq if freq != 1 else None,
        "expert_model_parallel_size": topology.ep,
    }


def _layout(topology: Topology) -> dict[str, object]:
    return {
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": None,
        **dict.fromkeys((*ENDS, "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")),
        **(_ends(topology) or {}),
    }


def _ends(topology: Topology) -> dict[str, object] | None:
    """Stages of other sizes at the ends, in the words of NeMo 2.3 and newer. None: it has no words for these."""
    held = [len(stage.layers) for stage in topology.stages]
    if len(set(held)) == 1:
        return {}
    middle = held[1:-1] or held[-1:]
    if len(set(middle)) > 1 or 0 in held:
        return None
    first, last = (None if end == middle[0] else end for end in (held[0], held[-1]))
    return {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}


def _files(form: Form, dtype: DType, settings: Dict[str, object]) -> dict[str, object]:
    said = str(settings.get("precision")).removesuffix("-mixed").removesuffix("-true")
    precision = PRECISIONS[dtype.name]
    legacy = form.megatron_legacy and not form.mcore
    return {
        "mcore_gpt": form.mcore,
        "transformer_engine": form.mcore and form.transformer_engine,
        "megatron_legacy": legacy or (False if "megatron_legacy" in settings else None),
        "precision": settings["precision"] if said == str(precision) else precision,
        # half precision weights with fp32 masters exist for these two only; NeMo stops at 32 with O2
        "megatron_amp_O2": bool(settings.get("megatron_amp_O2")) and dtype.name != "fp32",
    }


def _padding(config: ModelConfig, tp: int, divisor: int, tokens: int | None) -> dict[str, object]:
    """What makes NeMo build an embedding of exactly these rows: it pads the tokenizer's size, unless told the rows.

    How many of them are real then stands in a key that NeMo does not read; where that is not known, no tokenizer is to tell it.
    """
    if tokens is not None and config.vocab is not None and config.vocab <= tokens:
        for choice in (divisor, 128, 64, 32, 16, 8, 4, 2, 1):
            if -(-tokens // (choice * tp)) * choice * tp == config.vocab_rows:
                return {"make_vocab_size_divisible_by": choice, "override_vocab_size": None, vocabulary.KEY: None}
    told = {"override_vocab_size": config.vocab_rows, vocabulary.KEY: config.vocab}
    return {"make_vocab_size_divisible_by": divisor, **told}


def _sequence_lengths(config: ModelConfig, settings: dict[str, object], *, fresh: bool) -> None:
    """Lengths to train with: the source's, else all that the model can."""
    data = settings.get("data")
    if fresh or "encoder_seq_length" not in settings:
        settings["encoder_seq_length"] = config.max_positions
    if fresh and isinstance(data, dict):
        data["seq_length"] = config.max_positions


def refuse_inexpressible(config: ModelConfig, topology: Topology, form: Form) -> None:
    """Models and layouts that NeMo would build otherwise: written files would be wrong."""
    problems = [*neva_config.problems(config), *_layout_problems(config, topology, form)]
    if config.kind == "text":
        problems += _model_problems(config)
    if not form.mcore and config.kind == "text":
        problems += _legacy_problems(config)
    if problems:
        who = "NeMo" + ("" if form.mcore else " (legacy models, mcore_gpt false)")
        raise ConfigError("\n  ".join([f"{who} has no way to say:", *problems]))


def _model_problems(config: ModelConfig) -> list[str]:
    problems = bias_problems(config)
    if config.activation not in (_GATES if config.glu else UNGATED):
        problems.append(f"activation {config.activation!r} {'with' if config.glu else 'without'} a gate")
    if config.norm not in NORMS:
        problems.append(f"norm {config.norm!r}")
    if config.rope is None and not config.learned_positions:
        problems.append("no position embedding")
    return problems + _scaling_problems(config)


def _scaling_problems(config: ModelConfig) -> list[str]:
    """Llama 3.1's scaling is a switch in NeMo: its numbers are in the code. Of a dynamic one a note tells."""
    if config.rope is None or not config.rope.scaling or config.rope.kind in ("default", "linear", "dynamic"):
        return []
    if config.rope.kind != "llama3":
        return [f"rope scaling {config.rope.kind!r}: only llama3 and linear are known to it"]
    fixed = llama3_scaling(8.0)
    other = [
        f"{k} {config.rope.scaling.get(k)} (fixed at {fixed[k]})"
        for k in fixed
        if k != "rope_type" and config.rope.scaling.get(k) != fixed[k]
    ]
    return [f"llama3 rope scaling with {', '.join(other)}"] if other else []


def _layout_problems(config: ModelConfig, topology: Topology, form: Form) -> list[str]:
    """NeMo keeps the chunks of an interleaved pipeline in a list, which neither saves nor loads rank files of an archive."""
    if topology.vpp > 1:
        return [f"an interleaved pipeline (vpp {topology.vpp}) in an archive: it neither saves nor loads one there"]
    stages = f"{config.layers} layers over {topology.pp} stages as {[len(stage.layers) for stage in topology.stages]}"
    if (ends := _ends(topology)) is None:
        return [f"{stages}: only its first and last stage may have other sizes"]
    if ends and (not form.mcore or neva_config.is_neva(config)):
        return [f"{stages}: stages of {'NeVA' if form.mcore else 'such models'} are all equal"]
    return []


def _legacy_problems(config: ModelConfig) -> list[str]:
    problems = []
    if config.kv_heads != config.heads:
        problems.append(f"{config.kv_heads} key/value heads for {config.heads} heads (grouped queries)")
    if config.experts:
        problems.append(f"{config.experts} experts")
    if config.qk_norm:
        problems.append("norms of queries and keys")
    if config.sliding_window:
        problems.append(f"a sliding window of {config.sliding_window}")
    if config.qkv_bias and not config.out_bias:
        problems.append("biases of q/k/v alone")
    if config.rope is not None and config.rope.kind == "llama3":
        problems.append("llama3 rope scaling")
    return [f"{problem}: save for Megatron-Core (--saver.mcore-gpt true)" for problem in problems]
