"""Our NeMo 2 folders before Megatron-Core: loaded strictly by its own loader as NeMo asks for them, logits equal transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.judge.judge import agreed, load
from tests.judge.models import Logits, build, logits
from tests.judge.ranks import Layout
from tests.judge.spec import spec_from_hf
from tools.golden_cases import convert

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
Hf = Callable[..., Path]
Expected = Callable[[Path], Any]


def judged(weights: Path, hf: Path, ids: torch.Tensor, layout: Layout) -> Logits:
    """Every sharded name begins with `module.`, every stored one has to be asked for, and the other way round."""
    config = json.loads((hf / "config.json").read_text())

    def job() -> Logits | None:
        from megatron.core import dist_checkpointing

        chunks = build(spec_from_hf(config, layout.tp, DIVISOR), layout)
        (chunk,) = chunks
        wanted = chunk.sharded_state_dict(prefix="module.")
        found = dist_checkpointing.load(wanted, str(weights), strict="raise_all")
        assert found.pop("global_step") == 0
        load(chunks, {"model": {n.removeprefix("module."): v for n, v in found.items() if n.startswith("module.")}})
        return logits(chunks, ids)

    return agreed(layout, job)[..., : config["vocab_size"]]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
def test_logits_of_our_folder_equal_those_of_transformers(
    kind: str, layout: Layout, hf: Hf, ids: torch.Tensor, expected: Expected, tmp_path: Path
) -> None:
    source = hf(kind)
    options = {"transformer_impl": "local"}
    convert(source, tmp_path / "ours", saver="nemo2", vocab_divisor=DIVISOR, saver_options=options)
    found = judged(tmp_path / "ours" / "weights", source, ids, layout)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=1e-5)
