"""Kinds of damage to a folder of rank files: missing, stray, doubled and mixed ranks; the tracker; the hf/ folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptconv.errors import ConfigError, CoverageError, FormatError, ReplicaError
from tests.hostile.damage import (
    ITERATION,
    PT,
    RANKS,
    TRACKER,
    Act,
    Case,
    Row,
    cases,
    copied,
    cut,
    edit_json,
    edit_pt,
    from_other,
    instead,
    link,
    moved,
    rank_dir,
    rank_pt,
    remove,
    text,
)

Refusal = (FormatError, ConfigError, CoverageError)


_FILES: dict[str, Row] = {
    f"file of pp {p} tp {t}": (remove(rank_pt(p, t)), f"mp_rank_{t:02d}_{p:03d}") for p, t in RANKS
}
_STAGES: dict[str, Row] = {
    f"pp {p} tp {t}": (copied(rank_pt(1 - p, t), rank_pt(p, t)), "embed" if p == 0 else "final_layernorm")
    for p, t in RANKS
}
_NEIGHBOURS: dict[str, Row] = {
    f"tp {t}": (copied(rank_pt(0, 1 - t), rank_pt(0, t)), rank_pt(0, t), "not the one") for t in (0, 1)
}
RANK_CASES: list[Case] = [
    *cases(
        "rank missing",
        "mcore",
        {f"pp {p} tp {t}": (remove(rank_dir(p, t)), ITERATION, f"missing: pp {p} tp {t}") for p, t in RANKS},
        Refusal,
    ),
    *cases("rank missing", "mcore", _FILES),
    *cases(
        "rank missing",
        "mcore",
        {
            "a stage": (remove(rank_dir(1, 0), rank_dir(1, 1)), ITERATION),
            "a column": (remove(rank_dir(0, 1), rank_dir(1, 1)), ITERATION),
            "all but one": (remove(*(rank_dir(p, t) for p, t in RANKS[1:])), ITERATION),
        },
        Refusal,
    ),
    *cases("rank missing", "moe", {f"tp {t} ep {e}": (remove(rank_dir(e, t)), ITERATION) for e, t in RANKS}, Refusal),
    *cases(
        "rank missing",
        "legacy",
        {f"tp {t}": (remove(f"{ITERATION}/mp_rank_{t:02d}"), ITERATION) for t in (0, 1)},
        Refusal,
    ),
    *cases(
        "stray rank folder",
        "mcore",
        {
            "tp 2": (copied(rank_dir(0, 0), rank_dir(0, 2)), ITERATION),
            "pp 2": (copied(rank_dir(0, 0), rank_dir(2, 0)), ITERATION),
            "one number": (copied(rank_dir(0, 0), f"{ITERATION}/mp_rank_00"), ITERATION, "mp_rank_00"),
            "three numbers": (copied(rank_dir(0, 0), f"{rank_dir(0, 0)}_000"), ITERATION),
            "no numbers": (copied(rank_dir(0, 0), f"{ITERATION}/mp_rank_xx"), "mp_rank_xx"),
            "a file": (text(f"{ITERATION}/mp_rank_05_000", "x"), "mp_rank_05_000"),
            "empty": (lambda f: (f / rank_dir(0, 3)).mkdir(), "mp_rank_03_000"),
            "a backup": (copied(rank_dir(0, 0), rank_dir(0, 0) + ".bak"), "mp_rank_00_000.bak"),
        },
        Refusal,
    ),
    *cases(
        "rank or iteration twice",
        "mcore",
        {
            "a wider number": (copied(rank_dir(0, 1), f"{ITERATION}/mp_rank_001_000"), "mp_rank_001_000", "same rank"),
            "a wider stage": (copied(rank_dir(1, 1), f"{ITERATION}/mp_rank_01_0001"), "mp_rank_01_0001", "same rank"),
            "iteration": (copied(ITERATION, "iter_1"), "iter_1", "twice"),
            "iteration with zeros": (copied(ITERATION, "iter_00000001"), "iter_00000001", "twice"),
        },
    ),
    *cases("rank is another stage's", "mcore", _STAGES, Refusal),
    *cases("rank is its neighbour's", "mcore", _NEIGHBOURS, wishes={"check": True}),
]


def _stage(pp: int) -> Act:
    """Both ranks of a stage: their replicas agree with each other."""

    def act(folder: Path) -> None:
        for tp in (0, 1):
            from_other(rank_pt(pp, tp))(folder)

    return act


def _fewer_experts(state: dict[str, Any]) -> None:
    name = next(n for n in state["model"] if "experts" in n and n.endswith("weight1"))
    del state["model"][name]


def rows(*named: str) -> dict[str, Row]:
    return {f"pp {p} tp {t}": (from_other(rank_pt(p, t)), *named) for p, t in RANKS}


MIXED_CASES: list[Case] = [
    *cases(
        "rank of another model", "mcore", rows("layer_norm_weight", "mp_rank_01_00"), ReplicaError, other="mcore other"
    ),
    *cases(
        "rank of another model",
        "legacy",
        {f"legacy tp {t}": (from_other(f"{ITERATION}/mp_rank_{t:02d}/{PT}"), "norm") for t in (0, 1)},
        ReplicaError,
        other="legacy other",
    ),
    *cases("rank of a wider model", "mcore", rows("ffn_hidden_size"), FormatError, other="mcore wide"),
    *cases("rank of another dtype", "mcore", rows("fp32"), (CoverageError, FormatError), other="mcore fp32"),
    *cases(
        "rank of another layout",
        "mcore",
        {f"of tp 4, {k}": v for k, v in rows("tensor_model_parallel_size").items()},
        FormatError,
        other="mcore tp4",
    ),
    *cases(
        "rank of another layout",
        "mcore",
        {f"of vpp 2, {k}": v for k, v in rows("model chunks").items()},
        FormatError,
        other="mcore vpp2",
    ),
    *cases(
        "rank of another layout",
        "mcore",
        {
            "folders of pp 1 too": (from_other(ITERATION), ITERATION, "mixed"),
            "folders of tp 4 too": (copied(rank_dir(0, 1), rank_dir(0, 3)), ITERATION),
        },
        FormatError,
        other="mcore tp2",
    ),
    *cases(
        "stage of another model, --check",
        "mcore",
        {f"pp {p}": (_stage(p), rank_pt(p, 0), rank_pt(p, 1)) for p in (0, 1)},
        other="mcore other",
        wishes={"check": True},
    ),
    *cases(
        "rank of another iteration",
        "mcore",
        {
            f"pp {p} tp {t}": (edit_pt(rank_pt(p, t), lambda s: s.update(iteration=2)), ITERATION, "iteration")
            for p, t in RANKS
        },
    ),
    *cases(
        "rank without args",
        "mcore",
        {
            f"pp {p} tp {t}": (
                edit_pt(rank_pt(p, t), lambda s: s.pop("args") is None or s),
                ITERATION,
                f"mp_rank_{t:02d}_{p:03d}",
            )
            for p, t in RANKS
        },
    ),
    *cases(
        "experts damaged",
        "moe",
        {f"tp {t} ep {e} lacks one": (edit_pt(rank_pt(e, t), _fewer_experts), "experts") for e, t in RANKS},
        Refusal,
    ),
]


TRACKERS: dict[str, str | bytes] = {
    "empty": "",
    "text": "latest",
    "negative": "-1",
    "a fraction": "1.0",
    "long": "1" * 60,
    "another": "2",
    "hex": "0x1",
    "binary": b"\xff\xfe",
}
NO_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda p: p.symlink_to("/dev/zero"),
    "a link to nothing": lambda p: p.symlink_to("gone"),
}
TRACKER_CASES: list[Case] = [
    *cases(
        "tracker damaged",
        "mcore",
        {k: (text(TRACKER, v), "2" if k == "another" else TRACKER) for k, v in TRACKERS.items()},
    ),
    *cases("tracker damaged", "mcore", {"release": (text(TRACKER, "release"), "release")}),
    *cases(
        "tracker is no file",
        "mcore",
        {
            "a folder": (instead(TRACKER, Path.mkdir), TRACKER),
            "a pipe": (instead(TRACKER, os.mkfifo), TRACKER),
            "a device": (link(TRACKER, "/dev/zero"), TRACKER),
        },
    ),
    *cases(
        "rank file is no file",
        "mcore",
        {
            f"{k}, tp {t}": (instead(rank_pt(0, t), put), f"mp_rank_{t:02d}_000")
            for t in (0, 1)
            for k, put in NO_FILES.items()
        },
    ),
    *cases(
        "iteration missing",
        "mcore",
        {
            "renamed": (moved(ITERATION, "iter_0000002"), "iter_0000002"),
            "empty": (remove(*(rank_dir(p, t) for p, t in RANKS)), "source"),
            "distributed": (text(f"{ITERATION}/.metadata", ""), "mcore-dist"),
        },
    ),
    *cases(
        "hf folder beside damaged",
        "mcore",
        {
            "cut": (cut("hf/config.json", 0.5), "config.json"),
            "other family": (edit_json("hf/config.json", lambda t: t.update(model_type="???")), "???"),
            "other layers": (edit_json("hf/config.json", lambda t: t.update(num_hidden_layers=3)), "layers"),
            "other heads": (edit_json("hf/config.json", lambda t: t.update(num_attention_heads=4)), "heads"),
            "a pipe": (instead("hf/tokenizer.json", os.mkfifo), "tokenizer.json"),
            "link out": (link("hf/tokenizer.json", "/etc/passwd"), "tokenizer.json"),
        },
        (FormatError, ConfigError),
    ),
]

CASES = [*RANK_CASES, *MIXED_CASES, *TRACKER_CASES]
