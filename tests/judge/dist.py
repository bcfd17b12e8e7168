"""The verdict on a distributed checkpoint: loaded strictly by Megatron-Core at any layout, and what its models then compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.judge.fill import RankTensors, states
from tests.judge.judge import agreed, iteration_folder, load, named, rank_folder
from tests.judge.models import Logits, build, logits
from tests.judge.patches import know_classes
from tests.judge.ranks import Layout, run_ranks
from tests.judge.spec import spec_from_args, spec_from_hf

State = dict[str, Any]


def judge_dist_logits(
    folder: Path,
    hf: Path,
    ids: torch.Tensor,
    layout: Layout,
    *,
    divisor: int = 128,
    strict: str = "raise_all",
    from_args: bool = False,
) -> Logits:
    """Logits, trimmed to the true vocabulary, of the checkpoint in `folder` loaded at `layout`.

    `strict` is a StrictHandling of Megatron-Core: `raise_all` refuses keys that the models lack and keys that the checkpoint
    lacks. The models are built from the source's config.json, or with `from_args` from what the checkpoint says of itself;
    their vocabulary is padded for `layout`, whatever rows are stored.
    """
    config = json.loads((hf / "config.json").read_text())
    saved = iteration_folder(folder)

    def job() -> Logits | None:
        spec = spec_from_hf(config, layout.tp, divisor)
        if from_args:
            spec = replace(spec_from_args(read_common(saved)["args"]), vocab_rows=spec.vocab_rows)
        return logits(load_dist(build(spec, layout), saved, strict), ids)

    return agreed(layout, job)[..., : config["vocab_size"]]


def dist_states(folder: Path, hf: Path, layout: Layout, *, divisor: int = 128) -> dict[str, RankTensors]:
    """What every rank's models hold after loading, for comparison with `filled_states`."""
    config = json.loads((hf / "config.json").read_text())
    saved = iteration_folder(folder)

    def job() -> tuple[str, RankTensors]:
        spec = spec_from_hf(config, layout.tp, divisor)
        return rank_folder(layout), states(load_dist(build(spec, layout), saved, "raise_all"))

    return dict(run_ranks(layout, job))


def read_common(saved: Path) -> State:
    """`common.pt` by Megatron-Core's own reader: torch.load that knows no classes but Megatron-Core's safe ones.

    Its training code takes these two from it, and the number of the folder must be the one inside.
    """
    from megatron.core import dist_checkpointing

    know_classes()
    common: State = dist_checkpointing.load_common_state_dict(str(saved))
    assert common["checkpoint_version"] == 3.0
    assert saved.name in ("release", f"iter_{common['iteration']:07d}")
    return common


def load_dist(chunks: list[Any], saved: Path, strict: str) -> list[Any]:
    """The model chunks, with what is stored for them.

    Tensors are read into the parameters themselves, which hold NaN before: what no chunk of the checkpoint covers stays NaN
    (zero in the two tensors of vocabulary rows, whose count may differ).
    """
    from megatron.core import dist_checkpointing

    wanted = sharded(chunks, read_common(saved).get("content_metadata"))
    load(chunks, dist_checkpointing.load(wanted, str(saved), strict=strict))
    return chunks


def sharded(chunks: list[Any], metadata: State | None) -> State:
    """What to save or load. `metadata` says how tensors are named and cut: when loading, what the checkpoint itself says of it
    (`content_metadata`, since 0.13), for Megatron's training code asks nothing else either.
    """
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in named(chunks).items()}
