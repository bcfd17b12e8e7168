"""zarr checkpoints of ours before Megatron-Core 0.12, the judge that can still read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from tests.judge.ranks import Layout
from tests.mcore_dist.old_megatron import OldMegatron

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16


@pytest.mark.parametrize(
    ("kind", "dtype", "layout"),
    [
        ("llama-tied", "float32", Layout(tp=2, pp=2)),
        ("qwen3", "bfloat16", Layout(tp=2, dp=2)),
        ("mixtral", "float32", Layout(ep=2)),
    ],
    ids=["tied", "bf16", "experts"],
)
def test_megatron_core_012_computes_the_same_from_our_zarr(
    kind: str,
    dtype: str,
    layout: Layout,
    hf: Callable[..., Path],
    ids: torch.Tensor,
    expected: Callable[[Path], Any],
    tmp_path: Path,
    old_megatron: OldMegatron,
) -> None:
    source = hf(kind, dtype=dtype)
    options = {"backend": "zarr", "transformer_impl": "local", "mcore_version": "0.12"}
    ckptconv.convert(source, tmp_path / "ours", saver="mcore-dist", vocab_divisor=DIVISOR, saver_options=options)
    found = old_megatron.judge(tmp_path / "ours", source, ids, layout, divisor=DIVISOR)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=1e-5)
