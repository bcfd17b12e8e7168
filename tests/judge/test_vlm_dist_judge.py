"""Distributed checkpoints of LLaVA models: real Megatron-Core loads ours at any layout, and ours reads what it saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptconv
from ckptconv.combine import prepare_combine
from ckptconv.executor.execute import execute
from tests.judge.dist import load_dist, sharded
from tests.judge.judge import agreed, iteration_folder, load, rank_folder, read_rank
from tests.judge.models import _gathered
from tests.judge.ranks import Layout, run_ranks
from tests.judge.test_vlm_judge import DIVISOR, QUICK, TOLERANCE, combined, described, pixels, text
from tests.judge.vlm import build_llava, forward
from tests.judge.vlm_reference import hf_llava, make_llava

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
Llava = Callable[[str], Path]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_llava(tmp_path_factory.mktemp(f"llava-{kind}"), kind)
        return made[kind]

    return get


def distributed(parts: Path, out: Path, layers: str, impl: str) -> Path:
    options = {"transformer_impl": impl, "layers": layers}
    job = ckptconv.Job(parts / "lm", saver="mcore-dist", saver_options=options, vocab_divisor=DIVISOR)
    prepared = prepare_combine(job, ckptconv.Job(parts / "vision"), ckptconv.Job(parts / "whole"))
    execute(prepared.plan, out, QUICK)
    return iteration_folder(out)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2)], ids=lambda layout: layout.name)
@pytest.mark.parametrize("layers", ["stacked", "separate"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_ours_load_strictly_at_any_layout(kind: str, layers: str, layout: Layout, llava: Llava, tmp_path: Path) -> None:
    """Nothing missing and nothing left over, modules' objects included; on one stage the logits are transformers'."""
    parts = llava(kind)
    saved = distributed(parts, tmp_path / "out", layers, "local")
    whole = described(parts, layout, sees_class_token=True)

    def job() -> Any:
        (model,) = load_dist([build_llava(whole, layout)], saved, "raise_all")
        assert not [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
        return _gathered(forward(model, text(), pixels())) if layout.pp == 1 else None

    if layout.pp > 1:
        assert run_ranks(layout, job) == [None] * layout.world
        return
    expected = hf_llava(parts / "whole", text(), pixels(), "full")
    np.testing.assert_allclose(agreed(layout, job)[..., : expected.shape[-1]], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layers", ["stacked", "separate"])
def test_norms_are_filed_as_modules_of_transformer_engine_ask_for_them(
    layers: str, llava: Llava, tmp_path: Path
) -> None:
    """Of the files for those modules, which have objects that Megatron's own modules do not ask for."""
    parts, layout = llava("clip"), Layout(tp=2)
    saved = distributed(parts, tmp_path / "out", layers, "transformer_engine")
    whole = described(parts, layout, sees_class_token=True)

    def job() -> Any:
        model = build_llava(whole, layout, engine_keys=True)
        return _gathered(forward(load_dist([model], saved, "assume_ok_unexpected")[0], text(), pixels()))

    expected = hf_llava(parts / "whole", text(), pixels(), "full")
    np.testing.assert_allclose(agreed(layout, job)[..., : expected.shape[-1]], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("engine_keys", [False, True])
@pytest.mark.parametrize("metadata", [{}, {"non_homogeneous_layers": True}], ids=["stacked", "separate"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_megatron_core_saved_is_read_bit_for_bit(
    kind: str, metadata: dict[str, Any], engine_keys: bool, llava: Llava, tmp_path: Path
) -> None:
    """Saved by models of two tensor ranks and two stages, filled from rank files that the judge of those has passed."""
    parts, layout = llava(kind), Layout(tp=2, pp=2)
    files = combined(parts, tmp_path / "ranks", layout)
    whole = described(parts, layout, sees_class_token=True)
    saved = tmp_path / "saved" / "iter_0000001"
    saved.mkdir(parents=True)

    def job() -> None:
        from megatron.core import dist_checkpointing

        state = read_rank(files / rank_folder(layout) / "model_optim_rng.pt")
        model = build_llava(whole, layout, engine_keys=engine_keys)
        load([model], state)
        beside = {name: state[name] for name in ("args", "checkpoint_version", "iteration")}
        dist_checkpointing.save({**sharded([model], metadata), **beside}, str(saved))

    run_ranks(layout, job)
    (saved.parent / "latest_checkpointed_iteration.txt").write_text("1")
    theirs, ours = (
        ckptconv.load(folder, loader_options={"vision_heads": 4}).tensors
        for folder in (saved.parent, tmp_path / "ranks")
    )
    assert theirs.keys() == ours.keys()
    assert [key.name for key in ours if theirs[key].numpy().tobytes() != ours[key].numpy().tobytes()] == []
