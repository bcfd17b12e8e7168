"""The judge judged: filled without ckptconv it computes what transformers computes, and it notices a wrong tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.judge.fill import filled_logits
from tests.judge.ranks import Layout, run_ranks

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
TOLERANCE = 1e-5

CASES = [
    ("llama", Layout(tp=2, pp=2)),
    ("llama-tied", Layout(pp=4)),
    ("llama-bias", Layout(tp=2)),
    ("llama3", Layout()),
    ("mistral", Layout(tp=4)),
    ("qwen2", Layout(tp=4)),
    ("qwen3", Layout(tp=2, pp=2)),
    ("mixtral", Layout(tp=2, ep=2, etp=1)),
]


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=lambda x: x.name if isinstance(x, Layout) else x)
def test_judge_filled_from_hf_computes_the_logits_of_transformers(
    kind: str, layout: Layout, hf: Callable[..., Path], ids: torch.Tensor, expected: Callable[[Path], Any]
) -> None:
    folder = hf(kind)
    found = filled_logits(folder, ids, layout, divisor=16)
    np.testing.assert_allclose(found, expected(folder), rtol=0, atol=TOLERANCE)


def test_judge_places_layers_of_virtual_stages(
    hf: Callable[..., Path], ids: torch.Tensor, expected: Callable[[Path], Any]
) -> None:
    folder = hf("llama", num_hidden_layers=8)
    found = filled_logits(folder, ids, Layout(tp=2, pp=2, vpp=2), divisor=16)
    np.testing.assert_allclose(found, expected(folder), rtol=0, atol=TOLERANCE)


def test_a_failing_rank_is_an_error_with_its_traceback() -> None:
    def job() -> None:
        raise ValueError("this very rank")

    with pytest.raises(RuntimeError, match=r"rank 0:(?s:.*)this very rank"):
        run_ranks(Layout(), job)


def test_the_logits_notice_every_single_tensor(hf: Callable[..., Path], ids: torch.Tensor) -> None:
    """One tensor's rows turned by one must move some logit by far more than we allow."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(hf("llama"), dtype=torch.float32)
    with torch.no_grad():
        plain = model(ids).logits
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.copy_(kept.roll(1, 0))
            moved = float((model(ids).logits - plain).abs().max())
            parameter.copy_(kept)
            assert moved > 100 * TOLERANCE, f"{name}: {moved}"
