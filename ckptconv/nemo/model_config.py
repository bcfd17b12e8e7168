"""`model_config.yaml` of NeMo as statements about a model and its layout; what it does not say is left unsaid, as Megatron's args are."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from ckptconv.dtypes import DTYPES, DType
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_read import UNSUPPORTED, Statement, layout, model_fields, refuse_unsupported
from ckptconv.nemo import sentencepiece, vocabulary, yaml_file

NAME = "model_config.yaml"
SECTIONS = ("model", "cfg")  # of a whole training configuration, and of a Lightning checkpoint's hyper parameters
COPIED = (  # the same word for the same thing in Megatron's args
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "layernorm_epsilon", "qk_layernorm", "window_size",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "expert_model_parallel_size",
    "make_vocab_size_divisible_by", "position_embedding_type", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size",
    "moe_layer_freq", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
)  # fmt: skip
ENDS = {  # stages of other sizes at the ends: Megatron-Core's names until 0.9 and since
    "first_pipeline_num_layers": "decoder_first_pipeline_num_layers",
    "last_pipeline_num_layers": "decoder_last_pipeline_num_layers",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
NORMS = {"layernorm": "LayerNorm", "LayerNorm": "LayerNorm", "rmsnorm": "RMSNorm", "RMSNorm": "RMSNorm"}
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # each also as fast-, with gate and up in one tensor
PLAIN = ("gelu", "squared-relu")
SPECS = (None, "", "te_gpt", "modelopt")
POSITIONS = (None, "rope", "learned_absolute")
PRECISIONS = {"32": "fp32", "16": "fp16", "bf16": "bf16"}
_OFF: Dict[str, Callable[[object], bool]] = {  # keys, and whether a value means nothing special
    "name": lambda v: v in SPECS or not isinstance(v, str),
    "position_embedding_type": lambda v: v in POSITIONS,
    "transformer_block_type": lambda v: v in (None, "pre_ln"),
    "attention_type": lambda v: v in (None, "multihead"),
    "normalize_attention_scores": lambda v: v in (None, True),
    "normalization": lambda v: v is None or v in NORMS,
    **dict.fromkeys(
        (
            "headscale",
            "layernorm_zero_centered_gamma",
            "apply_embedding_scaling",
            "mcore_customization_config",
            "hyena",
        ),
        lambda v: not v,
    ),
}


@dataclass(frozen=True, slots=True)
class NemoConfig:
    """`raw` is the model's section with references resolved; `args` what it states, in the words of Megatron's args.

    `mcore`, `transformer_engine`: None where the file does not say. `gated`: the activation of a gated mlp, which args cannot name.
    """

    raw: dict[str, object]
    args: dict[str, object]
    where: str
    mcore: bool | None = None
    transformer_engine: bool | None = None
    megatron_legacy: bool = False
    o2: bool = False
    dtype: DType | None = None
    gated: str | None = None
    gate_apart: bool = False
    tokenizer: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def variant(self) -> frozenset[str]:
        """The form of legacy tensors, which names alone cannot tell."""
        gate = "gate_apart" if self.gate_apart else "gate_joined"
        return frozenset({"qkv_v0" if self.megatron_legacy else "qkv_v2", gate})

    @property
    def sentencepiece(self) -> bool:
        """Whether `tokenizer.model` is a file of sentencepiece; it may be of another library."""
        return self.tokenizer.get("library") in (None, "sentencepiece")

    @property
    def override(self) -> int | None:
        """The rows that NeMo builds whatever the tokenizer."""
        return vocabulary.number(self.raw, "override_vocab_size", self.where)

    @property
    def multimodal(self) -> bool:
        """Whether there is an image encoder or its projector beside the language model (NeVA)."""
        return bool(self.raw.get("mm_cfg"))

    @property
    def encoder_name(self) -> str:
        """Where NeMo takes the image encoder from: a name or path."""
        match self.raw:
            case {"mm_cfg": {"vision_encoder": {"from_pretrained": str(name)}}}:
                return name
        return "(not said)"


def read(text: bytes, where: str, *, plain_rope: bool = False) -> NemoConfig:
    """The file. `plain_rope` overrules `scale_positional_embedding`, which NeMo's converters set for every llama."""
    root = yaml_file.read(text, where)
    section = next(((name,) for name in SECTIONS if isinstance(root.get(name), dict)), ())
    raw = yaml_file.resolved(root, section, where)
    _refuse(raw, where)
    activation = _text(raw, "activation", where)
    gated = GATED.get(activation.removeprefix("fast-")) if activation else None
    args, notes = _args(raw, where, plain_rope)
    refuse_unsupported(args, where)
    tokenizer = raw.get("tokenizer")
    return NemoConfig(
        raw, args, where,
        mcore=_flag(raw, "mcore_gpt", where),
        transformer_engine=_flag(raw, "transformer_engine", where),
        megatron_legacy=bool(_flag(raw, "megatron_legacy", where)),
        o2=bool(_flag(raw, "megatron_amp_O2", where)),
        dtype=_precision(raw, where),
        gated="gelu_new" if gated and _flag(raw, "openai_gelu", where) else gated,
        gate_apart=gated is not None and activation in GATED and not raw.get("mcore_gpt"),
        tokenizer=dict(tokenizer) if isinstance(tokenizer, dict) else {},
        notes=notes,
    )  # fmt: skip


def statement(nemo: NemoConfig, vocab: int | None) -> Statement:
    """What the file says of the model and its layout, to be compared with the tensors. `vocab` is the true size, see `vocabulary`."""
    fields = model_fields(nemo.args, nemo.where)
    if nemo.gated is not None:
        fields |= {"glu": True, "activation": nemo.gated}
    return Statement(
        nemo.where.rpartition("/")[2], fields, layout(nemo.args, nemo.where), vocab, nemo.args.get("padded_vocab_size")
    )


def true_vocabulary(nemo: NemoConfig, tokens: int | None, *, given: bool = False) -> int | None:
    """The true size, see `vocabulary.true_size`; `given`: the tokens are those of a tokenizer that the user names."""
    ours = vocabulary.number(nemo.raw, vocabulary.KEY, nemo.where)
    return vocabulary.true_size(ours, nemo.override, tokens, given=given)


def tokens(nemo: NemoConfig, tokenizer: bytes, where: object = "tokenizer.model") -> int | None:
    """How many NeMo finds in the sentencepiece model of an archive."""
    pieces = sentencepiece.pieces(tokenizer, where)
    more = nemo.tokenizer.get("additional_special_tokens")
    if not more or not nemo.tokenizer.get("sentencepiece_legacy"):
        return len(pieces)
    if not isinstance(more, list):
        return None
    return len(pieces) + len({str(token) for token in more} - set(pieces))  # NeMo appends those that are new


def _refuse(raw: Dict[str, object], where: str) -> None:
    """Models whose tensors, or what is computed with them, no config of ours describes."""
    found = [f"{key}: {_short(raw[key])}" for key, off in _OFF.items() if key in raw and not off(raw[key])]
    activation = raw.get("activation")
    if activation is not None and str(activation).removeprefix("fast-") not in (*GATED, *PLAIN):
        found.append(f"activation: {_short(activation)}")
    if raw.get("mcore_gpt") is False and raw.get("transformer_engine"):
        found.append("transformer_engine: true with mcore_gpt: false (TransformerEngine's own layers)")
    if raw.get("mcore_gpt") is False and raw.get("num_moe_experts") not in (None, 1):
        found.append(f"num_moe_experts: {_short(raw['num_moe_experts'])} with mcore_gpt: false")
    if found:
        raise ConfigError(f"{where} describes a model that is not supported yet: {', '.join(found)}")


def _args(raw: Dict[str, object], where: str, plain_rope: bool) -> tuple[dict[str, object], tuple[str, ...]]:
    args = {key: raw[key] for key in (*COPIED, *UNSUPPORTED) if key in raw}
    args |= {theirs: raw[ours] for ours, theirs in ENDS.items() if raw.get(ours) is not None}
    args |= _attention(raw) | _block(raw, where)
    length = raw.get("max_position_embeddings") or raw.get("encoder_seq_length")
    if length is not None:
        args["max_position_embeddings"] = length
    args["num_experts"] = raw.get("num_moe_experts")
    shared = _flag(raw, "share_embeddings_and_output_weights", where)
    args["untie_embeddings_and_output_weights"] = shared is False  # NeMo ties them where the file is silent
    if (override := vocabulary.number(raw, "override_vocab_size", where)) is not None:
        args["padded_vocab_size"] = override
    rope, notes = _rope(raw, where, plain_rope)
    window = raw.get("window_size")
    if isinstance(window, list) and window and isinstance(window[0], int):
        notes += (_window_note(window, _name(where)),)
    return args | rope, notes


def _window_note(window: list[object], where: str) -> str:
    return (
        f"{where}: window_size {window} lets a token see itself and {window[0]} before it; NeMo's converters write the "
        f"sliding_window of Hugging Face there, which counts the token too (the model may have had {window[0]})"
    )


def _attention(raw: Dict[str, object]) -> dict[str, object]:
    """Sizes that NeMo works out itself where the file has null."""
    args: dict[str, object] = {}
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if raw.get("kv_channels") is not None:
        args["kv_channels"] = raw["kv_channels"]
    elif isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
        args["kv_channels"] = hidden // heads
    groups = raw.get("num_query_groups")
    if (groups if groups is not None else heads) is not None:
        args["num_query_groups"] = groups if groups is not None else heads
    return args


def _block(raw: Dict[str, object], where: str) -> dict[str, object]:
    args: dict[str, object] = {}
    if (bias := _flag(raw, "bias", where)) is not None:
        args["add_bias_linear"] = bias
        args["add_qkv_bias"] = bool(_flag(raw, "qkv_bias", where))
    if raw.get("normalization") is not None:
        args["normalization"] = NORMS[str(raw["normalization"])]
    activation = _text(raw, "activation", where)
    if activation is not None:
        args["swiglu"] = activation.removeprefix("fast-") in GATED
        args["squared_relu"] = activation == "squared-relu"
        args["openai_gelu"] = bool(_flag(raw, "openai_gelu", where)) and not args["swiglu"]
    return args


def _rope(raw: Dict[str, object], where: str, plain_rope: bool) -> tuple[dict[str, object], tuple[str, ...]]:
    args = {
        theirs: raw[ours]
        for ours, theirs in (
            ("rotary_percentage", "rotary_percent"),
            ("rotary_base", "rotary_base"),
            ("seq_len_interpolation_factor", "rotary_seq_len_interpolation_factor"),
        )
        if raw.get(ours) is not None
    }
    if raw.get("position_embedding_type") != "rope" or not _flag(raw, "scale_positional_embedding", where):
        return args, ()
    name = _name(where)
    if plain_rope:
        return args, (f"{name}: scale_positional_embedding is true; left out, as asked for",)
    if raw.get("mcore_gpt") is not True:  # read for Megatron-Core models alone; the buffers of legacy files show it
        return args, (f"{name}: scale_positional_embedding is true, but does nothing in a legacy model; left out",)
    factor = args.get("rotary_seq_len_interpolation_factor")
    args |= {"use_rope_scaling": True, "rope_scaling_factor": 8.0 if factor is None else factor}
    return args, (_scaling_note(factor, args.get("rotary_base", 10000), name),)


def _scaling_note(factor: object, base: object, where: str) -> str:
    """Whether the switch can be believed: NeMo's own converters set it where it does not belong."""
    if factor is not None:
        return (
            f"{where}: scale_positional_embedding and seq_len_interpolation_factor {factor} are both set, as NeMo's converter "
            "does for Llama 3.1; taken as its scaling by that factor (NeMo would interpolate positions besides)"
        )
    doubt = ", and rotary_base 10000 is not that of Llama 3.1: very likely" if base == 10000 else ": perhaps"
    return (
        f"{where}: scale_positional_embedding is true, so Llama 3.1's rope scaling is taken. NeMo's converters 2.0 to 2.4 set "
        f"it for every llama{doubt} this model has none. Say what is right with --loader.config HF_DIR"
    )


def _precision(raw: Dict[str, object], where: str) -> DType | None:
    """What NeMo computes in; tensors may have another dtype."""
    value = raw.get("precision")
    if value is None:
        return None
    kind = str(value).removesuffix("-mixed").removesuffix("-true")
    if isinstance(value, bool) or kind not in PRECISIONS:
        raise ConfigError(
            f"{where}: precision is {_short(value)}; known: {', '.join(PRECISIONS)}, with -mixed or -true"
        )
    return DTYPES[PRECISIONS[kind]]


def _name(where: str) -> str:
    """What notes call the file, which go into the manifest: without the path of the archive."""
    return where.rpartition("!")[2]


def _flag(raw: Dict[str, object], key: str, where: str) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {_short(value)}: it must be true or false")
    return value


def _text(raw: Dict[str, object], key: str, where: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: {key} is {_short(value)}: it must be text")
    return value


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
