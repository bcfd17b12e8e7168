"""Our towers and LLaVA models before real Megatron-Core: loaded strictly, and computing what transformers computes from the source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from ckptconv.combine import prepare_combine
from ckptconv.executor.execute import execute
from ckptconv.layout import layout_from
from ckptconv.testing.models import images, make_tower
from tests.judge.judge import agreed, iteration_folder, load, rank_folder, read_rank
from tests.judge.models import _gathered
from tests.judge.ranks import Layout, run_ranks
from tests.judge.spec import spec_from_hf
from tests.judge.vlm import IMAGE_TOKEN, Vision, Whole, build_llava, build_tower, forward, vision_from_hf
from tests.judge.vlm_reference import hf_internvit, hf_llava, hf_tower, make_llava

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
TOLERANCE = 1e-5
GOLDEN = Path(__file__).parents[1] / "golden" / "vlm"
LOCAL = {"transformer_impl": "local"}
QUICK = ckptconv.ExecuteOptions(durable=False)
TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def hf_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def pixels(size: int = 20) -> torch.Tensor:
    return torch.from_numpy(images(size))


# towers


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """(source, what transformers computes) of clip, siglip, internvit."""
    known: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in known and kind == "internvit":
            known[kind] = (GOLDEN / "internvit/src", hf_internvit(GOLDEN / "internvit/src", pixels(16)))
        elif kind not in known:
            source = make_tower(tmp_path_factory.mktemp(kind) / "hf", TOWERS[kind])
            known[kind] = (source, hf_tower(source, TOWERS[kind], pixels()))
        return known[kind]

    return get


Tower = Callable[[str], tuple[Path, Any]]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["clip", "siglip", "internvit"])
def test_towers_load_strictly_and_compute_what_transformers_does(
    kind: str, tp: int, tower: Tower, tmp_path: Path
) -> None:
    """InternViT's 25 heads are 26 at tp 2 and 28 at tp 4, and what it computes is the same."""
    source, expected = tower(kind)
    ckptconv.convert(source, tmp_path / "out", saver="mcore", tp=tp, dtype="fp32", saver_options=LOCAL)
    folder, layout, config = iteration_folder(tmp_path / "out"), Layout(tp=tp), hf_config(source)

    def job() -> Any:
        model = build_tower(vision_from_hf(config, tp), layout)
        load([model], read_rank(folder / rank_folder(layout) / "model_optim_rng.pt"))
        return model(pixels(config["image_size"])).numpy()

    np.testing.assert_allclose(agreed(layout, job), expected, rtol=TOLERANCE, atol=TOLERANCE)


# whole models


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with `whole`, transformers' LLaVA around the tower, and its parts `lm` and `vision` as models of their own."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_llava(tmp_path_factory.mktemp(f"llava-{kind}"), kind)
        return made[kind]

    return get


Llava = Callable[[str], Path]


def combined(parts: Path, out: Path, layout: Layout) -> Path:
    """Language model, tower and projector from three checkpoints."""
    degrees = layout_from({"tp": layout.tp, "pp": layout.pp}, None)
    job = ckptconv.Job(parts / "lm", saver="mcore", layout=degrees, saver_options=LOCAL, vocab_divisor=DIVISOR)
    prepared = prepare_combine(job, ckptconv.Job(parts / "vision"), ckptconv.Job(parts / "whole"), kind="llava")
    execute(prepared.plan, out, QUICK)
    return iteration_folder(out)


def described(parts: Path, layout: Layout, *, sees_class_token: bool) -> Whole:
    language = spec_from_hf(hf_config(parts / "lm"), layout.tp, DIVISOR)
    return Whole(language, vision_from_hf(hf_config(parts / "vision"), layout.tp), sees_class_token)


def text() -> torch.Tensor:
    """Two sentences around an image each, not at the same place."""
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, 130, (2, 9)))
    ids[0, 2] = ids[1, 5] = IMAGE_TOKEN
    return ids


def megatron_logits(folder: Path, whole: Whole, layout: Layout) -> Any:
    def job() -> Any:
        model = build_llava(whole, layout)
        load([model], read_rank(folder / rank_folder(layout) / "model_optim_rng.pt"))
        return _gathered(forward(model, text(), pixels()))

    return agreed(layout, job)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("strategy", ["clip-full", "clip-default", "siglip-full"])
def test_llava_of_our_parts_computes_the_logits_of_transformers(
    strategy: str, tp: int, llava: Llava, tmp_path: Path
) -> None:
    """`full`: the class token is seen; `default`: it is not. Both take the tower's last layer, which is what Megatron-Core has."""
    kind, _, select = strategy.partition("-")
    parts, layout = llava(kind), Layout(tp=tp)
    whole = described(parts, layout, sees_class_token=select == "full")
    found = megatron_logits(combined(parts, tmp_path / "out", layout), whole, layout)
    expected = hf_llava(parts / "whole", text(), pixels(), select)
    np.testing.assert_allclose(found[..., : expected.shape[-1]], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_stages_hold_what_megatron_core_asks_for(kind: str, llava: Llava, tmp_path: Path) -> None:
    """The tower and the projector on the first of two stages, and nothing of them on the second."""
    parts, layout = llava(kind), Layout(tp=2, pp=2)
    folder = combined(parts, tmp_path / "out", layout)
    whole = described(parts, layout, sees_class_token=True)

    def job() -> list[str]:
        model = build_llava(whole, layout)
        state = read_rank(folder / rank_folder(layout) / "model_optim_rng.pt")
        load([model], state)
        return sorted(state["model"])

    held = run_ranks(layout, job)
    assert [any(name.startswith("vision_") for name in names) for names in held] == [True, True, False, False]
    assert all(any(name.startswith("language_model.decoder.layers.1.") for name in names) for names in held)


def test_a_wrong_tensor_is_noticed(llava: Llava, tmp_path: Path) -> None:
    """The comparison has teeth: two of the tower's layers exchanged move the logits; a missing tensor is not loaded."""
    parts, layout = llava("clip"), Layout()
    folder = combined(parts, tmp_path / "out", layout)
    path = folder / "mp_rank_00" / "model_optim_rng.pt"
    state = read_rank(path)
    one, two = (f"vision_model.decoder.layers.{i}.self_attention.linear_qkv.weight" for i in (0, 1))
    state["model"][one], state["model"][two] = state["model"][two], state["model"][one]
    torch.save(state, path)
    whole = described(parts, layout, sees_class_token=True)
    expected = hf_llava(parts / "whole", text(), pixels(), "full")
    found = megatron_logits(folder, whole, layout)
    assert np.abs(found[..., : expected.shape[-1]] - expected).max() > 100 * TOLERANCE
    del state["model"][one]
    torch.save(state, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        megatron_logits(folder, whole, layout)


def test_heads_left_out_are_noticed(tower: Tower, tmp_path: Path) -> None:
    """26 heads, of which the last is zero, in a model that would have 25 of another size."""
    source, _ = tower("internvit")
    ckptconv.convert(source, tmp_path / "out", saver="mcore", tp=2, dtype="fp32", saver_options=LOCAL)
    folder, layout = iteration_folder(tmp_path / "out"), Layout(tp=2)

    def job() -> None:
        vision: Vision = replace(vision_from_hf(hf_config(source), 2), heads=28)
        load([build_tower(vision, layout)], read_rank(folder / rank_folder(layout) / "model_optim_rng.pt"))

    with pytest.raises(RuntimeError, match="size mismatch"):
        run_ranks(layout, job)
