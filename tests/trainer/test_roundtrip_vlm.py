"""LLaVA's two stages with a reshard between them: what is frozen keeps every bit, what goes on follows, and transformers agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

import ckptconv
from ckptconv.trainer import data
from ckptconv.trainer.config import Config
from ckptconv.trainer.launch import launch
from ckptconv.trainer.run import train
from tests.trainer import llava
from tests.trainer.runs import EXACT, PROJECTOR, SAVED, STEPS, TUNING, Curve, curve, distance

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
HEADS = {"vision_heads": 4}
SPREAD = {"tp": 2, "pp": 2}


def reshard(source: Path, out: Path, **wishes: Any) -> Path:
    options: dict[str, Any] = {"saver_options": {"transformer_impl": "local"}, "loader_options": HEADS}
    ckptconv.convert(
        source, out, saver="mcore", execute_options=ckptconv.ExecuteOptions(durable=False), **options, **wishes
    )
    return out


def second_stage(config: Config, load: Path, save: Path | None = None) -> Curve:
    history = train(config, load, save, fresh=True)
    return list(zip(history.losses, history.norms, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vlm")


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    """After the first stage, on one process."""
    launch(1, lambda: train(PROJECTOR.but(steps=0), save=folder / "start"))
    launch(1, lambda: train(PROJECTOR, save=folder / "first"))
    return folder / "first"


@pytest.fixture(scope="module")
def alone() -> Curve:
    """The first stage, never stopped."""
    return launch(1, lambda: curve(PROJECTOR))[0]


@pytest.fixture(scope="module")
def second(first: Path, folder: Path) -> tuple[Path, Curve]:
    """After the second stage, at tp2 pp2, from what was resharded."""
    there = reshard(first, folder / "first-tp2pp2", optimizer="drop", **SPREAD)
    (losses, *_) = launch(4, lambda: second_stage(TUNING.at(**SPREAD), there, folder / "second"))
    return folder / "second", losses


def parameters(folder: Path) -> dict[str, NDArray[Any]]:
    model = ckptconv.load(folder, loader_options=HEADS)
    return {key.name: tensor.numpy() for key, tensor in model.tensors.items()}


def part(name: str) -> str:
    head = name.split(".")[0]
    return head if head in ("vision", "projector") else "language"


def test_the_second_stage_is_that_of_one_process(first: Path, second: tuple[Path, Curve]) -> None:
    assert distance(second[1], launch(1, lambda: second_stage(TUNING, first))[0]) < EXACT


@pytest.mark.parametrize(
    ("before", "after", "frozen"), [("start", "first", {"language", "vision"}), ("first", "second", {"vision"})]
)
def test_frozen_parts_keep_every_bit(
    before: str, after: str, frozen: set[str], second: tuple[Path, Curve], folder: Path
) -> None:
    was, now = parameters(folder / before), parameters(folder / after)
    assert was.keys() == now.keys()
    same = {name: was[name].tobytes() == now[name].tobytes() for name in was}
    assert same == {name: part(name) in frozen for name in was}


@pytest.mark.parametrize(
    ("before", "world", "after", "sharded"),
    [({}, 1, SPREAD, False), ({"tp": 2}, 2, {"tp": 1, "pp": 2}, True)],
    ids=["one to tp2pp2", "tp2 to pp2, sharded"],
)
def test_a_stage_that_is_not_over_goes_on_elsewhere(
    before: dict[str, int], world: int, after: dict[str, int], sharded: bool, tmp_path: Path, alone: Curve
) -> None:
    """Only the projector has optimizer state, and args say that the rest is frozen."""
    config = PROJECTOR.but(distributed_optimizer=sharded)
    launch(world, lambda: train(config.at(**before).but(steps=SAVED), save=tmp_path / "half"))
    there = reshard(tmp_path / "half", tmp_path / "elsewhere", **after)
    found = launch(after["tp"] * after["pp"], lambda: curve(config.at(**after), load=there))[0]
    assert distance(found, alone[SAVED:STEPS]) < EXACT


def test_heads_are_asked_for(first: Path) -> None:
    """Nothing in the files of a tower of one's own tells how many it has."""
    with pytest.raises(ckptconv.CkptconvError, match="vision-heads"):
        ckptconv.load(first)


def test_transformers_computes_the_same_from_the_converted_end(
    second: tuple[Path, Curve], first: Path, folder: Path
) -> None:
    """The template brings what no training has: config.json, and the norm behind the tower that Megatron leaves out."""
    llava.filled(TUNING, ours(first)).save_pretrained(folder / "template")
    ckptconv.convert(
        second[0], folder / "hf", saver="hf", optimizer="drop", loader_options=HEADS, saver_options={"template": folder / "template"}
    )  # fmt: skip
    whole = reshard(second[0], folder / "second-whole", optimizer="drop", tp=1, pp=1)
    batch = data.batch(TUNING.but(precision="fp32"), range(4))
    assert TUNING.vision is not None
    expected, found = (
        llava.logits(model.float(), batch, TUNING.vision.patches).numpy()
        for model in (
            llava.filled(TUNING, ours(whole)),
            transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf").eval(),
        )
    )
    np.testing.assert_array_equal(found, expected)


def ours(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    model = torch.load(path, weights_only=False)["model"]
    return {name: tensor for name, tensor in model.items() if tensor is not None}
