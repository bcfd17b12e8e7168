"""The same losses however the model is spread, and a resumed run that cannot be told from one that never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptconv.trainer.config import Config
from ckptconv.trainer.launch import launch
from tests.trainer.runs import EXACT, FORMATS, KINDS, SAVED, Curve, Watched, curve, distance, watched

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
CASES: dict[str, Config] = {
    "dense-tp2pp2": KINDS["dense"].at(tp=2, pp=2),
    "dense-pp4": KINDS["dense"].at(pp=4),
    "dense-tp4": KINDS["dense"].at(tp=4),
    "dense-pp2vpp2dp2": KINDS["dense"].at(pp=2, vpp=2),
    "dense-dp4-sharded": KINDS["dense"].at().but(distributed_optimizer=True),
    "tied-tp2pp2": KINDS["tied"].at(tp=2, pp=2),
    "tied-pp2vpp2dp2": KINDS["tied"].at(pp=2, vpp=2),
    "tied-pp2vpp2dp2-sharded": KINDS["tied"].at(pp=2, vpp=2).but(distributed_optimizer=True),
    "experts-ep4": KINDS["experts"].at(ep=4),
    "experts-pp2ep2": KINDS["experts"].at(pp=2, ep=2),
    "experts-ep2dp2": KINDS["experts"].at(ep=2),
    "experts-ep2dp2-sharded": KINDS["experts"].at(ep=2).but(distributed_optimizer=True),
    "experts-tp2ep2-sharded": KINDS["experts"].at(tp=2, ep=2).but(distributed_optimizer=True),
    "projector-tp2pp2-sharded": KINDS["projector"].at(tp=2, pp=2).but(distributed_optimizer=True),
    "tuning-pp2vpp2dp2": KINDS["tuning"].at(pp=2, vpp=2),
}
ELASTIC = {  # a distributed checkpoint, and layouts that take it up without help
    "dense-tp2pp2": [{}, {"tp": 4}, {"pp": 4}],
    "tied-tp2pp2": [{"pp": 2, "vpp": 2}],
    "experts-pp2ep2": [{"ep": 4}, {"pp": 2}],
    "experts-ep2dp2-sharded": [{"pp": 2, "ep": 2}],
}


@pytest.fixture(scope="module")
def alone() -> dict[str, Curve]:
    """Every kind of model on one process."""
    return launch(1, lambda: {kind: curve(config) for kind, config in KINDS.items()})[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def spread(folder: Path) -> dict[str, Watched]:
    return launch(4, lambda: {name: watched(config, folder / name) for name, config in CASES.items()})[0]


@pytest.mark.parametrize("name", CASES)
def test_losses_do_not_depend_on_the_layout(name: str, spread: dict[str, Watched], alone: dict[str, Curve]) -> None:
    assert distance(spread[name].whole, alone[name.split("-")[0]]) < EXACT


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_equal_to_the_last_bit(name: str, kind: str, spread: dict[str, Watched]) -> None:
    assert spread[name].resumed[kind] == spread[name].whole[SAVED:]


def test_a_sharded_optimizer_is_a_plain_one(spread: dict[str, Watched]) -> None:
    for name in CASES:
        plain = name.removesuffix("-sharded")
        if plain in CASES:
            assert distance(spread[name].whole, spread[plain].whole) < EXACT, name


def test_a_distributed_checkpoint_is_taken_up_at_other_layouts(
    spread: dict[str, Watched], folder: Path, alone: dict[str, Curve]
) -> None:
    def job() -> dict[str, Curve]:
        return {
            f"{name} at {layout}": curve(CASES[name].at(**layout), folder / name / "torch_dist")
            for name, layouts in ELASTIC.items()
            for layout in layouts
        }

    for name, resumed in launch(4, job)[0].items():
        assert distance(resumed, alone[name.split("-")[0]][SAVED:]) < EXACT, name


def test_data_parallel_copies_may_change_between_rank_files(
    spread: dict[str, Watched], folder: Path, alone: dict[str, Curve]
) -> None:
    def job() -> dict[str, Curve]:
        return {name: curve(CASES[name], folder / name / "torch") for name in ("dense-dp4-sharded", "tied-pp2vpp2dp2")}

    for name, resumed in launch(2, job)[0].items():
        assert distance(resumed, alone[name.split("-")[0]][SAVED:]) < EXACT, name


def test_rank_files_of_another_layout_are_refused(spread: dict[str, Watched], folder: Path) -> None:
    with pytest.raises(Exception, match="is missing: was the checkpoint saved at another layout"):
        launch(1, lambda: curve(CASES["dense-pp4"].at(), folder / "dense-pp4" / "torch"))
    with pytest.raises(Exception, match=r"this run is LayoutConfig\(tp=2.*: reshard it"):
        launch(2, lambda: curve(CASES["dense-tp4"].at(tp=2), folder / "dense-tp4" / "torch"))
