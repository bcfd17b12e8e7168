"""Which fields of `args` we write with another value than the official converters do, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tools.golden_cases import Golden, convert
from tools.rank_files import args_of

UNKNOWN = "NOT EXPLAINED"
REASONS = {
    "bf16": "the tensors are bf16; the savers of 0.10 and 0.12 lose the flag, and their loader then upcasts",
    "params_dtype": "as bf16: ours is the dtype of the tensors",
    "rotary_base": "config.json's rope_theta; the official savers leave the default",
    "untie_embeddings_and_output_weights": "config.json says tied; the loaders before 0.12 say untied for every model",
    "attention_dropout": "config.json states 0.0; the official tool leaves Megatron's default for training",
    "hidden_dropout": "as attention_dropout",
    "tokenizer_type": "the tokenizer that travels is Hugging Face's",
    "tokenizer_model": "a path of the machine that ran the official tool; we write none",
    "seq_length": "config.json's max_position_embeddings; the official loaders write 4096 for every model",
    "encoder_seq_length": "as seq_length",
    "max_position_embeddings": "config.json's own",
    "expert_tensor_parallel_size": "experts are cut as the rest unless said otherwise, which is tp",
    "add_position_embedding": "rotary embeddings are said by position_embedding_type, as all later versions do",
    "use_rotary_position_embeddings": "deprecated spelling of position_embedding_type; it is what add_position_embedding was",
    "norm_epsilon": "config.json's rms_norm_eps",
}


class Row(NamedTuple):
    """One field of one output."""

    output: str
    field: str
    theirs: object
    ours: object
    reason: str


def args_rows(golden: Golden, work: Path) -> list[Row]:
    """Fields that both files have, and that differ in value or type."""
    convert(golden.source, work, **golden.wishes())
    return compare(golden.title, golden.args or args_of(golden.folder), args_of(work))


def compare(title: str, theirs: dict[str, Any], ours: dict[str, Any]) -> list[Row]:
    return [
        Row(title, name, theirs[name], value, REASONS.get(name, UNKNOWN))
        for name, value in ours.items()
        if name in theirs and json.dumps(theirs[name]) != json.dumps(value)
    ]


def unexplained(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.reason == UNKNOWN]
