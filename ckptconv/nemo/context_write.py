"""`context/` for a NeMo 2 checkpoint we write: the calls that build the model again, as io.json and as model.yaml, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import replace

from ckptconv.config import ModelConfig
from ckptconv.dtypes import DType
from ckptconv.errors import ConfigError
from ckptconv.megatron.args_table import moe_fields
from ckptconv.megatron.args_write import refuse_inexpressible as refuse_for_megatron
from ckptconv.megatron.saving import final_file
from ckptconv.megatron.versions import NEWEST, Core
from ckptconv.nemo import io_json, tokenizer_files, vocabulary, yaml_file
from ckptconv.nemo.context import ACTIVATIONS, FOLDER, MODELS, SCALING, YAML
from ckptconv.nemo.io_json import TARGET, Table, reference
from ckptconv.plan import File
from ckptconv.source import Source

HF_FOLDER = "nemo_tokenizer"
TOKENIZERS = "nemo.collections.common.tokenizers."
CLASSES = {  # family -> model and configuration; all of them take every field of Megatron-Core's
    "hf-llama": ("llama.LlamaModel", "llama.LlamaConfig"),
    "hf-mistral": ("mistral.MistralModel", "mistral.MistralConfig7B"),
    "hf-mixtral": ("mixtral.MixtralModel", "mixtral.MixtralConfig"),
    "hf-qwen2": ("qwen2.Qwen2Model", "qwen2.Qwen2Config"),
    "hf-qwen3": ("qwen3.Qwen3Model", "qwen3.Qwen3Config"),
}
GENERIC = ("base.GPTModel", "base.GPTConfig")
SCALED = ("llama.LlamaModel", "llama.Llama31Config")  # the one that applies Llama 3.1's rope scaling
LONGER = ("mixtral.", "qwen3.")  # modules with a field for max_position_embeddings besides seq_length
PRESET = ("qwen2.", "qwen3.")  # modules whose default is a vocabulary of their own
_FUNCTIONS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}


def refuse_inexpressible(config: ModelConfig) -> None:
    """Models that NeMo 2 would build otherwise: written files would be wrong."""
    scaling = config.rope.kind if config.rope is not None and config.rope.scaling else ""
    if scaling == "llama3" and config.rope is not None:
        if config.family in CLASSES and config.family != "hf-llama":
            raise ConfigError(f"NeMo 2 has llama3 rope scaling in its Llama classes alone, not for {config.family}")
        config = replace(config, rope=replace(config.rope, scaling=None))  # all of its numbers are fields
    if config.activation not in _FUNCTIONS:
        raise ConfigError(
            f"NeMo 2: no function is known for activation {config.activation!r}; known: {', '.join(_FUNCTIONS)}"
        )
    refuse_for_megatron(config, Core(NEWEST), legacy=False)


def files(config: ModelConfig, dtype: DType, divisor: int, tokenizer: Dict[str, Source]) -> list[File]:
    """All files of the folder but those of the tokenizer, which are copies (see `tokenizer_places`)."""
    model = _model(config, dtype, divisor, tokenizer)
    strategy: Table = {
        TARGET: "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
        "ckpt_save_optimizer": False,
    }
    trainer: Table = {
        TARGET: "nemo.lightning.pytorch.trainer.Trainer",
        "accelerator": "cpu",
        "strategy": strategy,
        "devices": 1,
    }
    true = _true_size(config, model["config"], tokenizer)
    root: Table = {TARGET: "nemo.lightning.io.pl.TrainerContext", "model": model, "trainer": trainer, "extra": true}
    return [
        final_file(f"{FOLDER}/{YAML}", yaml_file.dump({**model, **true})),
        final_file(f"{FOLDER}/{io_json.NAME}", io_json.write(root)),
    ]


def tokenizer_places(tokenizer: Dict[str, Source]) -> dict[str, Source]:
    """Where the files of the tokenizer lie in the checkpoint."""
    if found := tokenizer_files.of_hugging_face(tokenizer):
        return {f"{FOLDER}/{HF_FOLDER}/{name}": source for name, source in found.items()}
    return {f"{FOLDER}/{name}": source for name, source in tokenizer.items() if name == tokenizer_files.SENTENCEPIECE}


def _model(config: ModelConfig, dtype: DType, divisor: int, tokenizer: Dict[str, Source]) -> Table:
    scaled = config.rope is not None and config.rope.kind == "llama3"
    model, described = SCALED if scaled else CLASSES.get(config.family, GENERIC)
    fields: Table = {
        TARGET: MODELS + described,
        **_sizes(config),
        **_block(config),
        **_positions(config),
        **moe_fields(config),
        **_precision(dtype),
        **_vocabulary(config, divisor, tokenizer_files.tokens(tokenizer), preset=described.startswith(PRESET)),
    }
    if described.startswith(LONGER):
        fields["max_position_embeddings"] = config.max_positions
    return {TARGET: MODELS + model, "config": fields, **_tokenizer(tokenizer)}


def _sizes(config: ModelConfig) -> Table:
    return {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "ffn_hidden_size": config.ffn or config.moe_ffn,
        "num_attention_heads": config.heads,
        "num_query_groups": config.kv_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_positions,
        "share_embeddings_and_output_weights": config.tied,
    }


def _block(config: ModelConfig) -> Table:
    return {
        "normalization": "LayerNorm" if config.norm == "layernorm" else "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "activation_func": reference(_FUNCTIONS[config.activation]),
        "gated_linear_unit": config.glu,
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "window_size": [config.sliding_window - 1, 0] if config.sliding_window else None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _positions(config: ModelConfig) -> Table:
    if config.rope is None:
        return {"position_embedding_type": "learned_absolute", "rotary_base": 10000}
    scaling, kind = config.rope.scaling or {}, config.rope.kind
    return {
        "position_embedding_type": "rope",
        "rotary_base": config.rope.base,
        "rotary_percent": config.rope.percent,
        "seq_len_interpolation_factor": scaling.get("factor") if kind == "linear" else None,
        **({ours: scaling.get(theirs) for ours, theirs in SCALING.items()} if kind == "llama3" else {}),
    }


def _precision(dtype: DType) -> Table:
    if dtype.name not in ("fp32", "fp16", "bf16"):
        raise ConfigError(f"NeMo has no precision for tensors of {dtype.name}; known: fp32, fp16, bf16 (--dtype)")
    return {
        "bf16": dtype.name == "bf16",
        "fp16": dtype.name == "fp16",
        "params_dtype": reference(f"torch.{dtype.torch}"),
    }


def _vocabulary(config: ModelConfig, divisor: int, tokens: int | None, *, preset: bool) -> Table:
    """What makes NeMo build an embedding of these rows: it pads the tokens it finds, unless told the rows (2.3 and newer)."""
    padded: Table = {"make_vocab_size_divisible_by": divisor}
    by_itself = None if tokens is None or preset else -(-tokens // divisor) * divisor
    told = config.vocab is not None and by_itself == config.vocab_rows
    return padded if told else {**padded, "vocab_size": config.vocab_rows}


def _true_size(config: ModelConfig, fields: object, tokenizer: Dict[str, Source]) -> Table:
    """The true size of the vocabulary, where a reader would not come to it; beside the model, whose class takes no keys of ours."""
    preset = vocabulary.number(fields, "vocab_size", YAML) if isinstance(fields, dict) else None
    told = vocabulary.true_size(None, preset, tokenizer_files.tokens(tokenizer))
    return {} if config.vocab in (None, told) else {vocabulary.KEY: config.vocab}


def _tokenizer(tokenizer: Dict[str, Source]) -> Table:
    places = tokenizer_places(tokenizer)
    if tokenizer_files.of_hugging_face(tokenizer):
        kind = f"{TOKENIZERS}huggingface.auto_tokenizer.AutoTokenizer"
        return {"tokenizer": {TARGET: kind, "pretrained_model_name": HF_FOLDER}}
    if places:
        kind = f"{TOKENIZERS}sentencepiece_tokenizer.SentencePieceTokenizer"
        return {"tokenizer": {TARGET: kind, "model_path": tokenizer_files.SENTENCEPIECE}}
    return {"tokenizer": None}
