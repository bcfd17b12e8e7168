"""The verdict: a per-rank checkpoint loaded strictly by the Megatron-Core models it claims to be for, and what they then compute."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.judge.models import Logits, build, logits
from tests.judge.ranks import Layout, run_ranks
from tests.judge.spec import grouped, spec_from_args, spec_from_hf


def judge_logits(
    folder: Path,
    hf: Path,
    ids: torch.Tensor,
    layout: Layout,
    *,
    divisor: int = 128,
    from_args: bool = False,
    grouped_experts: bool = False,
) -> Logits:
    """Logits, trimmed to the true vocabulary, of the checkpoint in `folder` loaded at `layout`.

    The models are built from the source's config.json, or with `from_args` from what the checkpoint says of itself.
    """
    config = json.loads((hf / "config.json").read_text())
    release = iteration_folder(folder)

    def job() -> Logits | None:
        state = read_rank(release / rank_folder(layout) / "model_optim_rng.pt")
        spec = spec_from_args(state["args"]) if from_args else spec_from_hf(config, layout.tp, divisor)
        chunks = build(grouped(spec) if grouped_experts else spec, layout)
        load(chunks, state)
        return logits(chunks, ids)

    return agreed(layout, job)[..., : config["vocab_size"]]


def agreed(layout: Layout, job: Callable[[], Logits | None]) -> Logits:
    """The one answer of all ranks that have one."""
    answers = [x for x in run_ranks(layout, job) if x is not None]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], rtol=0, atol=1e-5)
    return answers[0]


def iteration_folder(folder: Path) -> Path:
    """As Megatron finds it: the tracker file names the iteration."""
    word = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / ("release" if word == "release" else f"iter_{int(word):07d}")


def rank_folder(layout: Layout) -> str:
    """As `get_checkpoint_name` of Megatron's training code spells this process's folder."""
    from megatron.core import parallel_state as ps

    name = f"mp_rank_{ps.get_tensor_model_parallel_rank():02d}"
    if layout.pp > 1:
        name += f"_{ps.get_pipeline_model_parallel_rank():03d}"
    if layout.ep > 1:
        name += f"_{ps.get_expert_model_parallel_rank():03d}"
    return name


def read_rank(path: Path) -> dict[str, Any]:
    """torch's own reader, refusing every class but Namespace."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    assert isinstance(state, dict)
    return state


def load(chunks: list[Any], state: dict[str, Any]) -> None:
    """Strictly: `_extra_state` of modules that keep none is the only thing Megatron-Core itself lets a file leave out."""
    for key, chunk in named(chunks).items():
        chunk.load_state_dict(state[key], strict=True)
        for name, parameter in chunk.named_parameters():
            assert not parameter.isnan().any(), name


def named(chunks: list[Any]) -> dict[str, Any]:
    """Model chunks under the names they have in a checkpoint."""
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}
