"""The round trips notice what they are there to notice: a checkpoint or a loss that is wrong in one small thing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.trainer import data
from ckptconv.trainer.__main__ import main
from ckptconv.trainer.launch import launch
from tests.trainer.runs import EXACT, SAVED, TIED, TUNING, Curve, curve, distance

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
LAYOUT = {"tp": 1, "pp": 2}
SEEN = 1e-6  # every fault moves the curve by far more than what counts as equal
Fault = Callable[[dict[str, Any]], None]


def swapped_moment(saved: dict[str, Any]) -> None:
    state = saved["optimizer"]["state"][0]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


def shifted_moment(saved: dict[str, Any]) -> None:
    state = saved["optimizer"]["state"][1]
    state["exp_avg"] = state["exp_avg"].roll(1, 0)


def step_off_by_one(saved: dict[str, Any]) -> None:
    for state in saved["optimizer"]["state"].values():
        state["step"] += 1


def position_off_by_one(saved: dict[str, Any]) -> None:
    saved["args"].consumed_train_samples += 1


def schedule_off(saved: dict[str, Any]) -> None:
    saved["opt_param_scheduler"]["num_steps"] += 8


def stale_copy(saved: dict[str, Any]) -> None:
    """One of two tied weights as it was a while ago."""
    saved["model"]["output_layer.weight"] *= 0.999


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curve]:
    folder = tmp_path_factory.mktemp("faults")
    run = TIED.at(**LAYOUT)
    launch(2, lambda: curve(run.but(steps=SAVED), save=folder))
    return folder, launch(2, lambda: curve(run, folder))[0]


@pytest.mark.parametrize(
    "fault", [swapped_moment, shifted_moment, step_off_by_one, position_off_by_one, schedule_off, stale_copy]
)
def test_a_fault_in_one_rank_of_a_checkpoint_shows(fault: Fault, runs: tuple[Path, Curve], tmp_path: Path) -> None:
    folder, good = runs
    spoil(folder, tmp_path, fault)
    assert distance(launch(2, lambda: curve(TIED.at(**LAYOUT), tmp_path))[0], good) > SEEN > 100 * EXACT


def spoil(folder: Path, into: Path, fault: Fault) -> None:
    """A copy of the checkpoint in which the last stage's file has the fault; the data position is that of all ranks."""
    for path in folder.rglob("*"):
        there = into / path.relative_to(folder)
        if path.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        elif path.suffix != ".pt":
            there.write_bytes(path.read_bytes())
        else:
            saved = torch.load(path, weights_only=False)
            if "001" in path.parent.name or fault is position_off_by_one:
                fault(saved)
            torch.save(saved, there)


def test_a_loss_that_counts_what_is_given_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mask, the question and the padding are learnt too."""
    good = launch(1, lambda: curve(TUNING))[0]
    batch = data.batch

    def unmasked(*given: Any) -> dict[str, torch.Tensor]:
        return (made := batch(*given)) | {"loss_mask": torch.ones_like(made["loss_mask"])}

    monkeypatch.setattr(data, "batch", unmasked)
    assert distance(launch(1, lambda: curve(TUNING))[0], good) > SEEN


def test_a_rank_that_fails_is_an_error_with_its_traceback() -> None:
    def job() -> None:
        raise ValueError("this very rank")

    with pytest.raises(Exception, match="this very rank"):
        launch(2, job)


@pytest.mark.parametrize(
    ("options", "file", "said"),
    [
        (["--tp", "0"], "", "every degree is at least 1"),
        (["--dp", "-1"], "", "every degree is at least 1"),
        ([], "[layout]\npp = 0", "every degree is at least 1"),
        ([], "[modle]", r"unknown table \[modle\]"),
        (["--config", "none.toml"], "", "No such file.*none.toml"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    options: list[str],
    file: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.toml").write_text(file)
    monkeypatch.setattr("sys.argv", ["trainer", "--config", str(tmp_path / "run.toml"), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])
