"""Checkpoints that Megatron-Core saves during the test, in every form it has, come back to Hugging Face bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from ckptconv.errors import PlanError
from ckptconv.testing.models import hf_logits, token_ids
from tests.judge.dist_write import write_dist
from tests.judge.ranks import Layout
from tests.mcore_dist.same import assert_same

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
Hf = Callable[..., Path]
Expected = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A model and how Megatron-Core saves it."""

    kind: str
    layout: Layout = field(default_factory=Layout)
    form: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        said = (f"{k}{'' if v is True else v}" for k, v in self.form.items())
        return "-".join([self.kind, self.layout.name, *said])


CASES = [
    Case("llama"),
    Case("llama", Layout(tp=2, pp=2)),
    Case("llama", Layout(tp=4)),  # a query group lies on several ranks
    Case("llama", Layout(pp=2, vpp=2)),
    Case("llama-bias", Layout(tp=2), {"singleton": True}),
    Case("llama-tied", Layout(pp=4), {"layers": "separate"}),
    Case("qwen2", Layout(pp=2, dp=2), {"fully_parallel": True}),
    Case("qwen2-tied", Layout(tp=2), {"bf16": True, "iteration": 1234567}),
    Case("qwen3", Layout(tp=2, pp=2), {"singleton": True}),
    Case("mixtral", Layout(tp=2)),
    Case("mixtral", Layout(ep=2, pp=2), {"fully_parallel": True, "bf16": True}),
    Case("mixtral", Layout(tp=2, ep=2, etp=1), {"layers": "separate"}),
    Case("mixtral", Layout(ep=4), {"singleton": True, "fully_parallel": True}),
]
Saved = Callable[[Case], tuple[Path, Path]]


@pytest.fixture(scope="module")
def saved(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(the Hugging Face folder, what Megatron-Core saved of it); each is made once."""
    made: dict[str, Path] = {}

    def get(case: Case) -> tuple[Path, Path]:
        source = hf(case.kind, dtype="bfloat16") if case.form.get("bf16") else hf(case.kind)
        if case.name not in made:
            place = tmp_path_factory.mktemp("megatron") / "run"
            made[case.name] = write_dist(source, place, case.layout, divisor=DIVISOR, **case.form)
        return source, made[case.name]

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_comes_back_bit_for_bit(case: Case, saved: Saved, tmp_path: Path) -> None:
    source, folder = saved(case)
    ckptconv.convert(folder, tmp_path / "back", saver="hf", saver_options={"template": source})
    assert_same(tmp_path / "back", source)


def test_random_states_are_lost_only_when_that_is_said(saved: Saved, tmp_path: Path) -> None:
    source, folder = saved(Case("llama", Layout(tp=2, pp=2), {"rng": True}))
    with pytest.raises(PlanError, match=r"RNG state(?s:.*)--optimizer drop"):
        ckptconv.convert(folder, tmp_path / "back", saver="hf", saver_options={"template": source})
    ckptconv.convert(folder, tmp_path / "back", saver="hf", saver_options={"template": source}, optimizer="drop")
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("form", [{}, {"layers": "separate"}, {"singleton": True}], ids=str)
def test_without_args_a_config_says_what_they_lack(form: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    source, folder = saved(Case("mixtral", Layout(pp=2), {"args": False, **form}))
    ckptconv.convert(
        folder, tmp_path / "back",
        loader="mcore-dist", loader_options={"config": source}, saver="hf", saver_options={"template": source},
        vocab_size=131,
    )  # fmt: skip
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize(
    ("kind", "family"), [("llama-tied", "hf-llama"), ("qwen3", "hf-qwen3"), ("mixtral", "hf-mixtral")]
)
def test_args_alone_are_enough_for_a_model_that_computes_the_same(
    kind: str, family: str, saved: Saved, expected: Expected, tmp_path: Path
) -> None:
    source, folder = saved(Case(kind, Layout(tp=2)))
    options = {"config_from_args": True}
    ckptconv.convert(folder, tmp_path / "back", saver="hf", family=family, saver_options=options)
    found = hf_logits(tmp_path / "back", token_ids())
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=1e-6)
