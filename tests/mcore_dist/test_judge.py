"""Distributed checkpoints of ours before the judge: loaded strictly by Megatron-Core at many layouts, logits equal transformers'."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from tests.judge.dist import dist_states, judge_dist_logits
from tests.judge.fill import filled_states, same_bits
from tests.judge.ranks import Layout
from tests.mcore_dist.old_megatron import OldMegatron

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
TOLERANCE = 1e-5
KINDS = ["llama", "llama-tied", "qwen2", "qwen3", "mixtral"]
LAYOUTS = [Layout(tp=2, pp=2), Layout(pp=4), Layout(tp=4)]  # tp 4: more ranks than key/value heads
Hf = Callable[..., Path]
Expected = Callable[[Path], Any]


@dataclass(frozen=True)
class Ours:
    """What we write: a model, and options of the saver. The judge's models are made of Megatron-Core's own modules, "local"."""

    kind: str
    layers: str = "stacked"
    files: int = 1
    impl: str = "local"

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.layers}-{self.files}"

    @property
    def options(self) -> dict[str, Any]:
        return {"layers": self.layers, "files": self.files, "transformer_impl": self.impl}


CASES = [Ours(kind, layers, files) for kind in KINDS for layers, files in (("stacked", 3), ("separate", 1))]
Written = Callable[[Ours], tuple[Path, Path]]


@pytest.fixture(scope="module")
def written(hf: Hf, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(the source, our files); each is made once."""
    made: dict[Ours, Path] = {}

    def get(ours: Ours) -> tuple[Path, Path]:
        source = hf(ours.kind)
        if ours not in made:
            made[ours] = tmp_path_factory.mktemp("ours") / "out"
            ckptconv.convert(source, made[ours], saver="mcore-dist", vocab_divisor=DIVISOR, saver_options=ours.options)
        return source, made[ours]

    return get


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("ours", CASES, ids=lambda ours: ours.name)
def test_logits_of_our_checkpoint_equal_those_of_transformers(
    ours: Ours, layout: Layout, written: Written, ids: torch.Tensor, expected: Expected
) -> None:
    check(ours, layout, written, ids, expected)


@pytest.mark.parametrize(
    "layout", [Layout(ep=2), Layout(tp=2, ep=2, etp=1), Layout(pp=2, ep=2)], ids=lambda at: at.name
)
@pytest.mark.parametrize("ours", [c for c in CASES if c.kind == "mixtral"], ids=lambda ours: ours.name)
def test_experts_are_dealt_to_any_number_of_ranks(
    ours: Ours, layout: Layout, written: Written, ids: torch.Tensor, expected: Expected
) -> None:
    check(ours, layout, written, ids, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_models_built_from_our_args_compute_the_same(
    kind: str, written: Written, ids: torch.Tensor, expected: Expected
) -> None:
    check(Ours(kind, "stacked", 3), Layout(), written, ids, expected, from_args=True)


@pytest.mark.parametrize("ours", CASES, ids=lambda ours: ours.name)
def test_models_hold_what_megatron_cores_own_sharding_gives(ours: Ours, written: Written) -> None:
    """Bit for bit, rows of padding too."""
    source, folder = written(ours)
    layout = Layout(pp=2, vpp=2) if ours.kind != "mixtral" else Layout(ep=2)
    found = dist_states(folder, source, layout, divisor=DIVISOR)
    theirs = filled_states(source, layout, DIVISOR)
    assert {rank: list(chunks) for rank, chunks in found.items()} == {rank: list(c) for rank, c in theirs.items()}
    for rank, chunks in theirs.items():
        for chunk, tensors in chunks.items():
            have = found[rank][chunk]
            assert list(have) == list(tensors)
            assert [name for name in tensors if not same_bits(have[name], tensors[name])] == []


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_objects_of_transformer_engine_are_all_that_is_left_over_beside_local_modules(
    kind: str, written: Written, ids: torch.Tensor, expected: Expected
) -> None:
    """What we write unless told otherwise, for Megatron-Core's default strictness and for the strictest."""
    ours = Ours(kind, impl="transformer_engine")
    check(ours, Layout(tp=2), written, ids, expected, strict="assume_ok_unexpected")
    with pytest.raises(RuntimeError, match="Missing keys") as error:
        check(ours, Layout(), written, ids, expected)
    left = set(re.findall(r"'(decoder[^']+)'", str(error.value)))
    assert {name.split(".")[-1] for name in left} == {"_extra_state"}
    assert "decoder.layers.self_attention.core_attention._extra_state" in left


def test_objects_of_experts_are_numbered_by_layer_and_then_by_expert(
    hf: Hf, tmp_path: Path, ids: torch.Tensor, expected: Expected
) -> None:
    """With as many layers as experts, either order would do."""
    source = hf("mixtral", num_hidden_layers=2)
    options = {"layers": "stacked", "transformer_impl": "local"}
    ckptconv.convert(source, tmp_path / "out", saver="mcore-dist", vocab_divisor=DIVISOR, saver_options=options)
    found = judge_dist_logits(tmp_path / "out", source, ids, Layout(ep=2), divisor=DIVISOR)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


def check(ours: Ours, layout: Layout, written: Written, ids: torch.Tensor, expected: Expected, **judging: Any) -> None:
    source, folder = written(ours)
    found = judge_dist_logits(folder, source, ids, layout, divisor=DIVISOR, **judging)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


def test_megatron_core_012_computes_the_same_from_ours(
    written: Written, ids: torch.Tensor, expected: Expected, old_megatron: OldMegatron
) -> None:
    source, folder = written(Ours("qwen2", "stacked", 3))
    found = old_megatron.judge(folder, source, ids, Layout(tp=2), divisor=DIVISOR)
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)
