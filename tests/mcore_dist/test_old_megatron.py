"""The second judge judged: Megatron-Core 0.12 saves and loads zarr with logits equal to transformers', and loads what 0.16 saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.judge.dist_write import write_dist
from tests.judge.judge import iteration_folder
from tests.judge.ranks import Layout
from tests.mcore_dist.old_megatron import OldMegatron

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
TOLERANCE = 1e-5
Hf = Callable[..., Path]
Expected = Callable[[Path], Any]


@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [("llama-tied", Layout(tp=2), Layout(pp=4)), ("mixtral", Layout(pp=2), Layout(ep=2, pp=2))],
)
def test_zarr_saved_by_it_computes_the_logits_of_transformers(
    kind: str,
    saved: Layout,
    loaded: Layout,
    hf: Hf,
    ids: torch.Tensor,
    expected: Expected,
    tmp_path: Path,
    old_megatron: OldMegatron,
) -> None:
    source = hf(kind)
    folder = old_megatron.write(source, tmp_path, saved, divisor=DIVISOR, backend="zarr")
    said = json.loads((iteration_folder(folder) / "metadata.json").read_text())
    assert said["sharded_backend"] == "zarr"
    found = old_megatron.judge(folder, source, ids, loaded, divisor=DIVISOR, from_args=True)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


def test_it_loads_what_the_newer_one_saved(
    hf: Hf, ids: torch.Tensor, expected: Expected, tmp_path: Path, old_megatron: OldMegatron
) -> None:
    source = hf("qwen3")
    folder = write_dist(source, tmp_path, Layout(tp=2), divisor=DIVISOR)
    found = old_megatron.judge(folder, source, ids, Layout(pp=2), divisor=DIVISOR)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


def test_what_goes_wrong_over_there_is_told(
    hf: Hf, ids: torch.Tensor, tmp_path: Path, old_megatron: OldMegatron
) -> None:
    with pytest.raises(RuntimeError, match=r"Megatron-Core 0.12.0: (?s:.*)latest_checkpointed_iteration"):
        old_megatron.judge(tmp_path, hf("llama"), ids, Layout())
