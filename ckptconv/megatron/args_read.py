"""A checkpoint's `args` as statements about the architecture and the layout; what args do not say is left unsaid, never defaulted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from ckptconv.config import Rope
from ckptconv.errors import ConfigError, TopologyError
from ckptconv.megatron.args_multimodal import stated_sight, stated_tower
from ckptconv.topology import account_counts, even_counts, parse_layout

Args = Dict[str, object]
LIMIT = 1 << 24  # sizes beyond this are damage, not models
NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
UNSUPPORTED = (
    "multi_latent_attention",
    "mtp_num_layers",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "is_hybrid_model",
    "hybrid_override_pattern",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "apply_layernorm_1p",
    "rotary_interleaved",
    "retro_add_retriever",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "apply_residual_connection_post_layernorm",
    "window_attn_skip_freq",
    "no_rope_freq",
    "qk_l2_norm",
    "glu_linear_offset",
    "activation_func_clamp_value",
)
ONLY = {  # args of which one value is supported
    "position_embedding_type": ("rope", "learned_absolute"),
    "moe_router_score_function": ("softmax",),
    "softmax_type": ("vanilla",),
}


@dataclass(frozen=True, slots=True)
class ArgsLayout:
    """Parallel sizes that args state; None: not said. `counts` are layers per chunk, [vpp][pp], where they can be derived."""

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    ep: int | None = None
    etp: int | None = None
    counts: list[list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What a checkpoint says of itself: fields of ModelConfig, layout, vocabulary (true size, rows), and what to call who says it.

    `tower` is the family and the heads of its vision tower.
    """

    where: str
    fields: Dict[str, object]
    layout: ArgsLayout = field(default_factory=ArgsLayout)
    vocab: object = None
    rows: object = None
    tower: tuple[str, int] | None = None


def statement(args: Args, where: str) -> Statement:
    """Args as a statement about the model; one that we do not support is refused."""
    refuse_unsupported(args, where)
    vocab, rows = args.get("vocab_size"), args.get("padded_vocab_size")
    fields = model_fields(args, where) | stated_sight(args, where)
    return Statement(where, fields, vocab=vocab, rows=rows, tower=stated_tower(args))


def refuse_unsupported(args: Args, where: str) -> None:
    """Models whose tensors would be read as something they are not, or that compute what no config of ours can say."""
    found = [f"{name} = {args[name]!r}" for name in UNSUPPORTED if args.get(name)]
    found += [f"{name} = {args[name]!r}" for name, known in ONLY.items() if args.get(name) not in (None, *known)]
    if found:
        raise ConfigError(f"{where}: args describe a model that is not supported yet: {', '.join(found)}")


def model_fields(args: Args, where: str) -> dict[str, object]:
    """ModelConfig fields that args state."""
    fields: dict[str, object] = {}
    for ours, theirs in _SIZES.items():
        value = next((v for name in theirs if (v := _size(args, name, where)) is not None), None)
        if value is not None:
            fields[ours] = value
    fields |= _attention(args, where) | _biases(args) | _block(args, where)
    rope = _rope(args, where)
    if rope is not None:
        fields["rope"] = rope[0]
        fields["learned_positions"] = rope[0] is None
    if "untie_embeddings_and_output_weights" in args:
        fields["tied"] = not args["untie_embeddings_and_output_weights"]
    return fields | _experts(args, fields, where)


_SIZES = {
    "layers": ("num_layers", "encoder_num_layers"),
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "ffn": ("ffn_hidden_size",),
    "max_positions": ("max_position_embeddings",),
}


def _size(args: Args, name: str, where: str, low: int = 1) -> int | None:
    value = args.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LIMIT:
        raise ConfigError(f"{where}: args.{name} is {value!r}: it must be a whole number from {low} to {LIMIT}")
    return value


def _number(args: Args, name: str, where: str) -> float | None:
    value = args.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ConfigError(f"{where}: args.{name} is {value!r}: it must be a positive number")
    return float(value)


def _attention(args: Args, where: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    if args.get("group_query_attention") is False:
        if (heads := _size(args, "num_attention_heads", where)) is not None:
            fields["kv_heads"] = heads
    elif (groups := _size(args, "num_query_groups", where)) is not None:
        fields["kv_heads"] = groups
    if args.get("qk_layernorm") is not None:
        fields["qk_norm"] = bool(args["qk_layernorm"])
    window = args.get("window_size")
    if isinstance(window, (tuple, list)) and len(window) == 2 and isinstance(window[0], int) and window[0] >= 0:
        fields["sliding_window"] = window[0] + 1
    return fields


def _biases(args: Args) -> dict[str, object]:
    """`add_bias_linear` (until 2022 `disable_bias_linear`) is for every linear, `add_qkv_bias` for one."""
    if args.get("disable_bias_linear") is not None:
        every = not args["disable_bias_linear"]
    elif args.get("add_bias_linear") is not None:
        every = bool(args["add_bias_linear"])
    else:
        return {}
    return {"qkv_bias": every or bool(args.get("add_qkv_bias")), "out_bias": every, "mlp_bias": every}


def _block(args: Args, where: str) -> dict[str, object]:
    fields: dict[str, object] = {}
    norm = args.get("normalization")
    if norm is not None:
        if not isinstance(norm, str) or norm not in NORMS:
            raise ConfigError(f"{where}: args.normalization is {norm!r}; known: {', '.join(NORMS)}")
        fields["norm"] = NORMS[norm]
    eps = next(
        (e for name in ("norm_epsilon", "layernorm_epsilon") if (e := _number(args, name, where)) is not None), None
    )
    if eps is not None:
        fields["norm_eps"] = eps
    if args.get("swiglu"):
        return fields | {"activation": "silu", "glu": True}
    if args.get("quick_geglu"):
        return fields | {"activation": "quick_gelu", "glu": True}
    if args.get("squared_relu"):
        return fields | {"activation": "relu2", "glu": False}
    if args.get("openai_gelu"):
        return fields | {"activation": "gelu_new", "glu": False}
    return fields | ({"activation": "gelu", "glu": False} if "swiglu" in args else {})


def _rope(args: Args, where: str) -> tuple[Rope | None] | None:
    """None: args do not say. (None,): learned positions."""
    position = args.get("position_embedding_type")
    if position is None and "use_rotary_position_embeddings" not in args:
        return None
    if position != "rope" and not args.get("use_rotary_position_embeddings"):
        return (None,)
    scaling: dict[str, object] | None = None
    if args.get("use_rope_scaling"):
        scaling = llama3_scaling(_number(args, "rope_scaling_factor", where) or 8.0)
    elif (factor := _number(args, "rotary_seq_len_interpolation_factor", where)) is not None:
        scaling = {"rope_type": "linear", "factor": factor}
    base, percent = _number(args, "rotary_base", where), _number(args, "rotary_percent", where)
    return (Rope(10000.0 if base is None else base, 1.0 if percent is None else percent, scaling),)


def llama3_scaling(factor: float) -> dict[str, object]:
    """What --use-rope-scaling means: everything but the factor is fixed in Megatron's code."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _experts(args: Args, fields: Dict[str, object], where: str) -> dict[str, object]:
    experts = _size(args, "num_experts", where)
    if experts is None:
        return {"experts": 0, "moe_layers": ()} if "num_experts" in args else {}
    out: dict[str, object] = {"experts": experts}
    size = _size(args, "moe_ffn_hidden_size", where) or fields.get("ffn")
    if size is not None:
        out["moe_ffn"] = size
    if (topk := _size(args, "moe_router_topk", where)) is not None:
        out["router_topk"] = topk
    if args.get("moe_router_pre_softmax") is not None:
        out["router_pre_softmax"] = bool(args["moe_router_pre_softmax"])
    layers = fields.get("layers")
    if isinstance(layers, int):
        out["moe_layers"] = moe_layers(args.get("moe_layer_freq", 1), layers, where)
    return out


def moe_layers(pattern: object, layers: int, where: str) -> tuple[int, ...]:
    """The layers with experts: every N-th from the first for a number N, else where the list says 1."""
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 1:
        return tuple(range(0, layers, pattern))
    if isinstance(pattern, (list, tuple)) and len(pattern) == layers and all(p in (0, 1) for p in pattern):
        return tuple(i for i, p in enumerate(pattern) if p)
    raise ConfigError(
        f"{where}: args.moe_layer_freq is {pattern!r}: expected a number, or a list of {layers} zeros and ones"
    )


def layout(args: Args, where: str) -> ArgsLayout:
    """Parallel sizes and the stage table; `model_parallel_size` is the tensor parallel size of files before version 3."""
    tp = _size(args, "tensor_model_parallel_size", where)
    tp = _size(args, "model_parallel_size", where) if tp is None else tp
    pp = _size(args, "pipeline_model_parallel_size", where)
    vpp = _size(args, "virtual_pipeline_model_parallel_size", where)
    ep = _size(args, "expert_model_parallel_size", where)
    etp = _size(args, "expert_tensor_parallel_size", where)
    layers = _size(args, "num_layers", where)
    counts = None if layers is None else _counts(args, layers, pp or 1, vpp or 1, where)
    return ArgsLayout(tp, pp, vpp, ep, etp, counts)


def _counts(args: Args, layers: int, pp: int, vpp: int, where: str) -> list[list[int]]:
    first = _size(args, "decoder_first_pipeline_num_layers", where, low=0)
    last = _size(args, "decoder_last_pipeline_num_layers", where, low=0)
    embedding = bool(args.get("account_for_embedding_in_pipeline_split"))
    loss = bool(args.get("account_for_loss_in_pipeline_split"))
    text = args.get("pipeline_model_parallel_layout")
    try:
        if text is not None:
            counts = parse_layout(_layout_text(text), pp, layers)
        elif embedding or loss:
            counts = account_counts(layers, pp, vpp, embedding=embedding, loss=loss)
        elif args.get("standalone_embedding_stage") and pp > 1:
            counts = [[0, *even_counts(layers, pp - 1, 1)[0]]]
        else:
            counts = even_counts(layers, pp, vpp, first, last)
    except TopologyError as error:
        raise ConfigError(f"{where}: args describe a pipeline that cannot be: {error}") from None
    if len(counts) != vpp or any(n < 0 for row in counts for n in row):
        raise ConfigError(
            f"{where}: args describe {len(counts)} chunks per stage, virtual_pipeline_model_parallel_size is {vpp}"
        )
    return counts


def _layout_text(value: object) -> str:
    """The layout as a string, of a length that unfolds to no more than a model can have."""
    short = value if isinstance(value, str) and len(value) <= 4096 else ""
    if short and math.prod(int(n) for n in re.findall(r"\d+", short)) <= LIMIT:
        return short
    raise TopologyError(
        f"pipeline_model_parallel_layout is {str(value)[:80]!r}: expected a layout string such as 'Et|t*3|tL'"
    )
