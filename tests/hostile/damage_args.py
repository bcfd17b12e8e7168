"""Kinds of damage to what a checkpoint says of itself: Megatron args, versions, and (with --check) the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckptconv.errors import ConfigError
from tests.hostile.damage import (
    PT,
    RANKS,
    Act,
    Case,
    Row,
    append,
    cases,
    cut,
    edit_args,
    edit_json,
    edit_pt,
    instead,
    link,
    rank_pt,
    remove,
    text,
)
from tests.hostile.damage_ranks import Refusal

MANIFEST = "ckptconv.json"


def every_rank(change: Callable[[dict[str, Any]], object]) -> Act:
    """The same edit of every rank's file, so that they agree on it."""

    def act(folder: Path) -> None:
        for pp, tp in RANKS:
            edit_pt(rank_pt(pp, tp), change)(folder)

    return act


def put(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update(values)


ARGS: dict[str, tuple[object, str]] = {
    "layers": (3, "layers"),
    "heads": (4, "heads"),
    "hidden": (64, "hidden"),
    "groups": (2, "kv_heads"),
    "head size": (8, "head"),
    "tp": (4, "tp"),
    "pp": (1, "pp"),
    "vpp": (2, "vpp"),
    "norm": ("LayerNorm", "norm"),
    "experts": (8, "experts"),
    "rows": (512, "512"),
}
FLAGS = {
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "groups": "num_query_groups",
    "head size": "kv_channels",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "norm": "normalization",
    "experts": "num_experts",
    "rows": "padded_vocab_size",
}
ABSURD: dict[str, object] = {
    "negative": -2,
    "2^40": 1 << 40,
    "text": "2",
    "true": True,
    "a list": [2],
    "a fraction": 2.5,
    "zero": 0,
}


_WRONG: dict[str, Row] = {k: (every_rank(edit_args(**{FLAGS[k]: v})), named) for k, (v, named) in ARGS.items()}
_ABSURD: dict[str, Row] = {
    f"{k} {what}": (every_rank(edit_args(**{FLAGS[k]: v})), FLAGS[k])
    for k in ("layers", "heads", "tp")
    for what, v in ABSURD.items()
}
ARGS_CASES: list[Case] = [
    *cases(
        "args contradict the tensors",
        "mcore",
        _WRONG,
        Refusal,
    ),
    *cases("args absurd", "mcore", _ABSURD, ConfigError),
    *cases(
        "args differ between ranks",
        "mcore",
        {k: (edit_pt(rank_pt(1, 0), edit_args(**{FLAGS[k]: v})), FLAGS[k]) for k, (v, _) in ARGS.items()},
    ),
    *cases(
        "args are none",
        "mcore",
        {
            k: (every_rank(put(args=v)), PT, "args")
            for k, v in {"a list": [1], "a table": {"num_layers": 4}, "text": "x"}.items()
        },
    ),
    *cases(
        "unsupported model",
        "mcore",
        {
            name: (every_rank(edit_args(**{name: value})), name)
            for name, value in {
                "multi_latent_attention": True,
                "mtp_num_layers": 1,
                "is_hybrid_model": True,
                "apply_layernorm_1p": True,
            }.items()
        },
        ConfigError,
    ),
    *cases(
        "version or iteration absurd",
        "mcore",
        {
            "version": (every_rank(put(checkpoint_version=9)), PT, "9"),
            "text": (every_rank(put(checkpoint_version="3")), PT, "'3'"),
            "iteration": (every_rank(put(iteration=-1)), PT, "-1"),
            "true": (every_rank(put(iteration=True)), PT, "True"),
        },
    ),
]


def _lists_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    edit_json(MANIFEST, lambda t: t["files"].update(pipe=next(iter(t["files"].values()))))(folder)


def _lists_link(folder: Path) -> None:
    (folder / "linked").symlink_to("/etc/passwd")
    edit_json(MANIFEST, lambda t: t["files"].update(linked=next(iter(t["files"].values()))))(folder)


def first_tensor(**values: int) -> Callable[[dict[str, Any]], None]:
    def change(file: dict[str, Any]) -> None:
        next(iter(file["tensors"].values())).update(values)

    return change


def escape(table: dict[str, Any]) -> None:
    table["files"]["../../x"] = table["files"].popitem()[1]


def manifest_rows(weights: str) -> dict[str, Row]:
    """Everything that can be wrong with a manifest; `weights` is a file that it lists."""

    def file(change: Callable[[dict[str, Any]], object]) -> Act:
        return edit_json(MANIFEST, lambda t: change(t["files"][weights]))

    return {
        "cut": (cut(MANIFEST, 0.5), MANIFEST),
        "empty": (text(MANIFEST, ""), MANIFEST),
        "a list": (text(MANIFEST, "[]"), MANIFEST),
        "nested": (text(MANIFEST, "[" * 10**5), MANIFEST),
        "a pipe": (instead(MANIFEST, os.mkfifo), MANIFEST),
        "a link to nothing": (link(MANIFEST, "gone"), MANIFEST),
        "another size": (file(lambda e: e.update(size=5)), weights),
        "another digest": (file(lambda e: e.update(rest="00" * 16)), weights),
        "a tensor too long": (file(first_tensor(nbytes=1 << 40)), weights),
        "a tensor before the file": (file(first_tensor(offset=-5)), weights),
        "a file unlisted": (edit_json(MANIFEST, lambda t: t["files"].pop(weights)), Path(weights).name),
        "a name escapes": (edit_json(MANIFEST, escape), MANIFEST),
        "lists a pipe": (_lists_pipe, "pipe"),
        "lists a link out": (_lists_link, "linked", "leaves"),
    }


def manifest_cases() -> Iterator[Case]:
    """With --check: the folder is not what its ckptconv.json says."""
    for base, weights, beside in (("mcore", rank_pt(1, 0), "hf/"), ("shards", "model-00002-of-00003.safetensors", "")):
        config, tokenizer = f"{beside}config.json", f"{beside}tokenizer.json"
        edited: dict[str, Row] = {
            f"{base}, config edited": (edit_json(config, lambda t: t.update(rope_theta=7.0)), config),
            f"{base}, tokenizer gone": (remove(tokenizer), tokenizer),
            f"{base}, tokenizer changed": (append(tokenizer, b" "), tokenizer),
        }
        wrong = {f"{base}, {k}": row for k, row in manifest_rows(weights).items()}
        yield from cases("folder not as its manifest says", base, edited, wishes={"check": True})
        yield from cases("manifest damaged", base, wrong, wishes={"check": True})


CASES = [*ARGS_CASES, *manifest_cases()]
