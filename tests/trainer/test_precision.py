"""Float32 and bfloat16 with float32 masters: they resume exactly too, dropout included, and stay near float64."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckptconv.trainer.config import Config
from ckptconv.trainer.launch import launch
from tests.trainer.runs import DENSE, SAVED, Curve, Watched, curve, distance, watched

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
NEAR = {"fp32": 1e-5, "bf16": 2e-2}


def dropping(config: Config) -> Config:
    return replace(config, model=replace(config.model, dropout=0.1))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Watched]:
    folder = tmp_path_factory.mktemp("precision")

    def job() -> dict[str, Watched]:
        cases = {p: DENSE.at(pp=2).but(precision=p, distributed_optimizer=p == "fp32") for p in NEAR}
        return {name: watched(dropping(config), folder / name) for name, config in cases.items()} | {
            f"{name} whole": Watched(curve(config)) for name, config in cases.items()
        }

    return launch(2, job)[0]


@pytest.mark.parametrize("precision", NEAR)
def test_what_is_dropped_is_the_same_after_a_resume(precision: str, seen: dict[str, Watched]) -> None:
    whole = seen[precision].whole
    assert seen[precision].resumed == {"torch": whole[SAVED:], "torch_dist": whole[SAVED:]}
    assert distance(whole, seen[f"{precision} whole"].whole) > 1e-4, "nothing was dropped"


@pytest.mark.parametrize("precision", NEAR)
def test_losses_are_near_those_of_float64(precision: str, seen: dict[str, Watched]) -> None:
    exact: Curve = launch(1, lambda: curve(DENSE))[0]
    found = seen[f"{precision} whole"].whole
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, exact, strict=True)) < NEAR[precision]
