"""LLaVA's two stages: what is frozen keeps every bit, what is trained changes, and no optimizer state is kept for the frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptconv.trainer import data
from ckptconv.trainer.config import Config
from ckptconv.trainer.launch import launch
from ckptconv.trainer.run import Run, train
from tests.trainer import llava
from tests.trainer.runs import PROJECTOR, TUNING

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
PARTS = ("language_model.", "vision_model.", "vision_projection.")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The start, after stage 1 on one process, and after stage 2 on four: in between, a distributed checkpoint."""
    at = {name: tmp_path_factory.mktemp(name) for name in ("start", "first", "first_dist", "second_dist", "second")}
    spread = TUNING.at(tp=2, pp=2).but(format="torch_dist")

    def alone(config: Config, save: str, load: str | None = None) -> None:
        launch(1, lambda: train(config, at[load] if load else None, at[save]))

    alone(PROJECTOR.but(steps=0), "start")
    alone(PROJECTOR, "first")
    alone(PROJECTOR.but(format="torch_dist"), "first_dist")
    launch(4, lambda: train(spread, at["first_dist"], at["second_dist"], fresh=True))
    alone(TUNING, "second", "second_dist")
    return at


def parameters(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    model = torch.load(path, weights_only=False)["model"]
    return {name: tensor for name, tensor in model.items() if tensor is not None}


@pytest.mark.parametrize(
    ("before", "after", "frozen"), [("start", "first", PARTS[:2]), ("first", "second", PARTS[1:2])]
)
def test_frozen_parts_keep_every_bit_and_others_change(
    before: str, after: str, frozen: tuple[str, ...], stages: dict[str, Path]
) -> None:
    was, now = parameters(stages[before]), parameters(stages[after])
    assert was.keys() == now.keys()
    assert {name.split(".")[0] + "." for name in was} == set(PARTS)
    assert {name: torch.equal(was[name], now[name]) for name in was} == {name: name.startswith(frozen) for name in was}


def test_only_what_is_trained_has_optimizer_state(stages: dict[str, Path]) -> None:
    (path,) = stages["first"].glob("iter_*/mp_rank_00/model_optim_rng.pt")
    saved = torch.load(path, weights_only=False)
    trained = [list(t.shape) for name, t in parameters(stages["first"]).items() if name.startswith(PARTS[2])]
    assert sorted(list(s["exp_avg"].shape) for s in saved["optimizer"]["state"].values()) == sorted(trained)


def test_it_computes_what_transformers_llava_computes(stages: dict[str, Path]) -> None:
    """With matrices far larger than a short training makes them, so that every activation bends."""
    assert TUNING.vision is not None
    bold = {name: t * 8 if t.dim() > 1 else t for name, t in parameters(stages["second"]).items()}
    batch = data.batch(TUNING, range(4))

    def ours() -> Tensor:
        run = Run(TUNING)
        run.chunks[0].load_state_dict(bold, strict=False)
        with torch.no_grad():
            found: Tensor = run.chunks[0](None, {"tokens": batch["tokens"], "images": batch["images"]})
        return found.transpose(0, 1)

    batch["images"] = batch["images"].double()
    theirs = llava.logits(llava.filled(TUNING, bold).double(), batch, TUNING.vision.patches)
    torch.testing.assert_close(launch(1, ours)[0], theirs, rtol=1e-5, atol=1e-5)
