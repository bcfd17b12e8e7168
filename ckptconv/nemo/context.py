"""`context/` of a NeMo 2 checkpoint as statements about a model: its model.yaml, or else its io.json, read as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ckptconv.config import Rope
from ckptconv.containers import json_file
from ckptconv.containers.folder import inside
from ckptconv.dtypes import BY_TORCH, DType
from ckptconv.errors import ConfigError, FormatError
from ckptconv.huggingface.files import side_files
from ckptconv.megatron.args_read import UNSUPPORTED, Statement, model_fields, refuse_unsupported
from ckptconv.nemo import io_json, tokenizer_files, vocabulary, yaml_file
from ckptconv.nemo.io_json import TARGET, Table
from ckptconv.source import Source, whole

FOLDER, YAML = "context", "model.yaml"
MODELS = "nemo.collections.llm.gpt.model."
FAMILIES = (
    "base",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "nemotron",
)  # modules whose models are Megatron-Core's own
ACTIVATIONS = {
    "torch.nn.functional.silu": "silu",
    "torch.nn.functional.gelu": "gelu",
    "torch._C._nn.gelu": "gelu",
    "nemo.collections.llm.fn.activation.squared_relu": "relu2",
    "nemo.collections.llm.fn.activation.openai_gelu": "gelu_new",
    "nemo.collections.llm.fn.activation.quick_gelu": "quick_gelu",
}
COPIED = (  # the same word for the same thing in Megatron's args
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "normalization", "layernorm_epsilon",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "window_size", "position_embedding_type", "rotary_base", "rotary_percent",
    "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size", "moe_layer_freq",
)  # fmt: skip
RENAMED = {
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "num_moe_experts": "num_experts",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "rope_scaling": "use_rope_scaling",
}
SCALING = {  # of the classes for Llama 3.1 and 3.2
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
# what io.json leaves to the class: a field that is missing there has a value all the same, which only NeMo's code knows
SPELLED = (
    "normalization", "layernorm_epsilon", "activation_func", "gated_linear_unit", "add_bias_linear", "position_embedding_type",
    "rotary_base", "share_embeddings_and_output_weights",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Context:
    """`raw` is the configuration of the model, its class under `_target_`; `files` are the tokenizer's.

    `true`: the size of the vocabulary as our key has it.
    """

    where: str
    raw: Table
    files: dict[str, Source] = field(default_factory=dict)
    true: int | None = None

    @property
    def family(self) -> str | None:
        """The family of Hugging Face that the class stands for, where it stands for one."""
        module = str(self.raw.get(TARGET)).removeprefix(MODELS).partition(".")[0]
        return f"hf-{module}" if module in FAMILIES and module not in ("base", "nemotron") else None

    @property
    def dtype(self) -> DType | None:
        """What the weights are in."""
        match self.raw:
            case {"params_dtype": {"_target_": str(name)}} | {"params_dtype": str(name)}:
                return BY_TORCH.get(name.removeprefix("torch."))
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """What may not be meant as it is said."""
        doubt = vocabulary.doubt(self.preset, self.vocabulary, f"{self.where}: vocab_size")
        match self.raw.get("window_size"):
            case [int() as before, _]:
                note = (
                    f"{self.where}: window_size lets a token see itself and {before} before it; NeMo's importers write the "
                    f"sliding_window of Hugging Face there, which counts the token too (the model may have had {before})"
                )
                return (note, *doubt)
        return doubt

    @property
    def preset(self) -> int | None:
        """The rows that NeMo builds whatever the tokenizer."""
        return vocabulary.number(self.raw, "vocab_size", self.where)

    @property
    def vocabulary(self) -> int | None:
        """The true size, see `vocabulary.true_size`."""
        return vocabulary.true_size(self.true, self.preset, tokenizer_files.tokens(self.files))


def folder_of(path: Path) -> Path:
    """Where the files of a checkpoint's context lie; the oldest have them beside the weights."""
    return path / FOLDER if (path / FOLDER).is_dir() else path


def has_context(path: Path) -> bool:
    """Whether a folder has one, judged by names alone."""
    return any((folder_of(path) / name).is_file() for name in (YAML, io_json.NAME))


def read(path: Path) -> Context | None:
    """The context of a checkpoint. None: it has none, or (in io.json alone) says too little; then a config has to be given."""
    folder = folder_of(path)
    if (folder / YAML).exists():
        where = f"{folder.name}/{YAML}"
        text = json_file.read_bytes(inside(folder, YAML), yaml_file.MAX_BYTES)
        model = yaml_file.read(text, folder / YAML)
        true = vocabulary.number(model, vocabulary.KEY, where)
    elif (folder / io_json.NAME).exists():
        where = f"{folder.name}/{io_json.NAME}"
        root = io_json.read(json_file.read_bytes(inside(folder, io_json.NAME)), str(folder / io_json.NAME))
        model = _table(root, "model", folder / io_json.NAME)
        extra = root.get("extra")
        true = vocabulary.number(extra, vocabulary.KEY, where) if isinstance(extra, dict) else None
    else:
        return None
    raw = _table(model, "config", folder / where.rpartition("/")[2])
    return Context(where, raw, _tokenizer(folder, model.get("tokenizer")), true)


def _table(parent: Table, key: str, where: Path) -> Table:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise FormatError(
            where, f"{key} is a {type(value).__name__}, expected a table: is this the context of a model?"
        )
    return value


def _tokenizer(folder: Path, said: object) -> dict[str, Source]:
    """The files of the tokenizer. What is no file of the context (a hub's name, a path of another machine) is not there."""
    match said:
        case {"model_path": str(name)} if _is_within(name) and (folder / name).is_file():
            return {tokenizer_files.SENTENCEPIECE: whole(str(inside(folder, name)))}
        case {"pretrained_model_name": str(name)} if _is_within(name) and (folder / name).is_dir():
            return tokenizer_files.of_hugging_face(side_files(folder / name))
    return {}


def _is_within(name: str) -> bool:
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def statement(context: Context) -> Statement:
    """What the configuration states, in the words of Megatron's args, to be compared with the tensors."""
    raw, where = context.raw, context.where
    _refuse(raw, where)
    args: dict[str, object] = {key: raw[key] for key in (*COPIED, *UNSUPPORTED) if key in raw}
    args |= {theirs: raw[ours] for ours, theirs in RENAMED.items() if ours in raw}
    args |= _sizes(raw)
    refuse_unsupported(args, where)
    fields = model_fields(args, where) | _activation(raw, where)
    rope = fields.get("rope")
    if isinstance(rope, Rope) and "scale_factor" in raw:
        scaling = {theirs: raw.get(ours) for ours, theirs in SCALING.items()}
        fields["rope"] = Rope(rope.base, rope.percent, {"rope_type": "llama3", **scaling})
    return Statement(where, fields, vocab=context.vocabulary)


def _refuse(raw: Table, where: str) -> None:
    """A model of another kind, and one that says less than it means."""
    target = str(raw.get(TARGET))
    if not target.startswith(tuple(f"{MODELS}{family}." for family in FAMILIES)):
        raise ConfigError(
            f"{where}: the model is a {target}; known are the classes of {MODELS}{{{','.join(FAMILIES)}}}. "
            "If it is the same as one of these, say so with --loader.config HF_DIR"
        )
    if silent := [name for name in SPELLED if name not in raw]:
        raise ConfigError(
            f"{where} leaves to the defaults of {target}: {', '.join(silent)}. Put {YAML} beside it, which has them all, or "
            "say them with --loader.config HF_DIR"
        )


def _sizes(raw: Table) -> dict[str, object]:
    """What NeMo works out itself where a field is null."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    channels = raw.get("kv_channels")
    if channels is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        channels = hidden // heads
    groups = raw.get("num_query_groups")
    return {
        "kv_channels": channels,
        "num_query_groups": heads if groups is None else groups,
        "max_position_embeddings": raw.get("max_position_embeddings") or raw.get("seq_length"),
        "untie_embeddings_and_output_weights": raw.get("share_embeddings_and_output_weights") is False,
    }


def _activation(raw: Table, where: str) -> dict[str, object]:
    match raw.get("activation_func"):
        case {"_target_": str(name)} if name in ACTIVATIONS:
            return {"activation": ACTIVATIONS[name], "glu": bool(raw.get("gated_linear_unit"))}
        case other:
            found = other.get(TARGET) if isinstance(other, dict) else other
            raise ConfigError(f"{where}: activation_func is {found}; known: {', '.join(ACTIVATIONS)}")
