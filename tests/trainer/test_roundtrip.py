"""The proof that resharding loses nothing: a run is saved at one layout, resharded, and goes on at another as if it had never stopped.

Trainer and converter know nothing of each other. The losses computed in float64 over float32 storage tell one wrong moment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptconv
from ckptconv.trainer.config import Config, LayoutConfig, ModelConfig
from ckptconv.trainer.launch import launch
from tests.trainer.runs import EXACT, KINDS, Curve, curve, distance

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
SAVED, STEPS = 4, 24  # 20 steps after the reshard
MODELS = {
    "dense": KINDS["dense"],
    "deep": replace(KINDS["dense"], model=ModelConfig(layers=8, hidden=16, ffn=32, heads=4, kv_heads=4)),
    "tied": KINDS["tied"],
    "experts": KINDS["experts"],
}


@dataclass(frozen=True)
class Side:
    """A layout on so many processes, and how the checkpoint is filed."""

    layout: LayoutConfig
    world: int
    sharded: bool = False
    filed: str = "torch"

    def of(self, config: Config) -> Config:
        return replace(config, layout=self.layout).but(
            steps=STEPS, distributed_optimizer=self.sharded, format=self.filed
        )


def side(world: int, *, sharded: bool = False, filed: str = "torch", **layout: int) -> Side:
    return Side(LayoutConfig(**layout), world, sharded, filed)


PAIRS: dict[str, tuple[str, Side, Side]] = {
    "dense tp2pp2 to pp4": ("dense", side(4, tp=2, pp=2), side(4, pp=4)),
    "dense tp4 to one": ("dense", side(4, tp=4), side(1)),
    "dense one to tp2pp2": ("dense", side(1), side(4, tp=2, pp=2)),
    "dense dp2 to dp1, sharded": ("dense", side(2, sharded=True), side(1, sharded=True)),
    "dense dp4 to tp2dp2, sharded": ("dense", side(4, sharded=True), side(4, tp=2, sharded=True)),
    "dense tp2 lists to pp2 sharded": ("dense", side(2, tp=2), side(4, pp=2, sharded=True)),
    "deep pp4vpp2 to pp2": ("deep", side(4, pp=4, vpp=2), side(2, pp=2)),
    "deep pp2vpp2dp2 to pp4vpp2, sharded": ("deep", side(4, pp=2, vpp=2, sharded=True), side(4, pp=4, vpp=2, sharded=True)),
    "tied tp2pp2 to pp2dp2, sharded": ("tied", side(4, tp=2, pp=2, sharded=True), side(4, pp=2, sharded=True)),
    "tied pp4 to tp2": ("tied", side(4, pp=4), side(2, tp=2)),
    "experts ep2 to ep1": ("experts", side(2, ep=2), side(1)),
    "experts tp2ep2 to pp2ep2": ("experts", side(4, tp=2, ep=2), side(4, pp=2, ep=2)),
    "experts ep4 to ep2dp2, sharded": ("experts", side(4, ep=4, sharded=True), side(4, ep=2, sharded=True)),
    "dense tp2pp2 to torch_dist": ("dense", side(4, tp=2, pp=2), side(4, tp=4, filed="torch_dist")),
    "dense torch_dist to pp2": ("dense", side(4, tp=4, filed="torch_dist"), side(2, pp=2)),
    "experts torch_dist to ep2, sharded": ("experts", side(4, ep=4, filed="torch_dist", sharded=True), side(2, ep=2, sharded=True)),
}  # fmt: skip


def by_world(jobs: dict[str, tuple[int, Callable[[], Curve]]]) -> dict[str, Curve]:
    """All jobs, those that need the same number of processes in one launch."""
    curves: dict[str, Curve] = {}
    for world in sorted({n for n, _ in jobs.values()}):
        mine = {name: job for name, (n, job) in jobs.items() if n == world}
        curves |= launch(world, partial(_all, mine))[0]
    return curves


def _all(jobs: dict[str, Callable[[], Curve]]) -> dict[str, Curve]:
    return {name: job() for name, job in jobs.items()}


def reshard(source: Path, out: Path, to: Side, **wishes: Any) -> Path:
    """By the command's own function; only what the destination's trainer must be told is said."""
    wanted: dict[str, Any] = {"transformer_impl": "local"}
    degrees: dict[str, Any] = {}
    if to.filed == "torch":
        at = to.layout
        degrees = {"tp": at.tp, "pp": at.pp, "vpp": at.vpp, "ep": at.ep, "etp": at.tp}
        wanted["distributed_optimizer"] = to.sharded
    saver = "mcore" if to.filed == "torch" else "mcore-dist"
    ckptconv.convert(
        source, out, saver=saver, saver_options=wanted, execute_options=ckptconv.ExecuteOptions(durable=False), **degrees, **wishes
    )  # fmt: skip
    return out


def begin(config: Config, folder: Path) -> Curve:
    """The first steps, saved."""
    return curve(config.but(steps=SAVED), save=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roundtrip")


def never_stopped(models: dict[str, Config]) -> dict[str, Curve]:
    """Every model, trained on one process."""
    return launch(1, lambda: {name: curve(config.but(steps=STEPS)) for name, config in models.items()})[0]


def first_halves(models: dict[str, Config], folder: Path) -> dict[str, Path]:
    """What every pair resumes from."""
    places = {name: folder / f"{i}-from" for i, name in enumerate(PAIRS)}
    by_world({n: (a.world, partial(begin, a.of(models[m]), places[n])) for n, (m, a, _) in PAIRS.items()})
    return places


def second_halves(models: dict[str, Config], saved: dict[str, Path], folder: Path) -> dict[str, Curve]:
    """After the reshard of every pair."""
    jobs: dict[str, tuple[int, Callable[[], Curve]]] = {}
    for i, (name, (model, _, to)) in enumerate(PAIRS.items()):
        there = reshard(saved[name], folder / f"{i}-to", to)
        jobs[name] = (to.world, partial(curve, to.of(models[model]), there))
    return by_world(jobs)


@pytest.fixture(scope="module")
def alone() -> dict[str, Curve]:
    return never_stopped(MODELS)


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Path]:
    return first_halves(MODELS, folder)


@pytest.fixture(scope="module")
def resumed(saved: dict[str, Path], folder: Path) -> dict[str, Curve]:
    return second_halves(MODELS, saved, folder)


@pytest.mark.parametrize("name", PAIRS)
def test_a_resharded_run_follows_the_one_that_never_stopped(
    name: str, resumed: dict[str, Curve], alone: dict[str, Curve]
) -> None:
    expected = alone[PAIRS[name][0]][SAVED:]
    assert len(resumed[name]) == STEPS - SAVED
    assert distance(resumed[name], expected) < EXACT


# Controls: faults that a converter may have, planted in what it wrote. Each must be seen.


def _each(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        yield path, torch.load(path, weights_only=False)


def _optimizer(content: dict[str, Any]) -> dict[str, Any]:
    """torch's own optimizer, which mixed precision wraps."""
    optimizer: dict[str, Any] = content["optimizer"]
    return optimizer.get("optimizer", optimizer)  # type: ignore[no-any-return]


def swapped_moments(folder: Path) -> None:
    path, content = next(_each(folder))
    state = _optimizer(content)["state"]
    a, b = next((a, b) for a, b in combinations(state.values(), 2) if a["exp_avg"].shape == b["exp_avg"].shape)
    a["exp_avg"], b["exp_avg"] = b["exp_avg"], a["exp_avg"]
    torch.save(content, path)


def one_step_more(folder: Path) -> None:
    for path, content in _each(folder):
        optimizer = _optimizer(content)
        for entry in [*optimizer["param_groups"], *optimizer["state"].values()]:
            if "step" in entry:
                entry["step"] += 1
        torch.save(content, path)


def stale_tie(folder: Path) -> None:
    """The last stage's copy of the tied embedding, a little off."""
    path, content = list(_each(folder))[-1]
    content["model"]["output_layer.weight"].add_(1e-3)
    torch.save(content, path)


FAULTS = {"moments": ("dense", swapped_moments), "steps": ("dense", one_step_more), "tie": ("tied", stale_tie)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, folder: Path, saved: dict[str, Path], alone: dict[str, Curve]) -> None:
    model, plant = FAULTS[fault]
    source = {"dense": "dense tp2pp2 to pp4", "tied": "tied pp4 to tp2"}[model]
    to = side(2, pp=2)
    there = reshard(saved[source], folder / f"fault-{fault}", to)
    config = to.of(MODELS[model]).but(steps=SAVED + 4)

    def go_on() -> Curve:
        return curve(config, load=there)

    expected = alone[model][SAVED : SAVED + 4]
    assert distance(launch(2, go_on)[0], expected) < EXACT, "without the fault it must follow"
    plant(there)
    assert distance(launch(2, go_on)[0], expected) > 100 * EXACT


def test_a_stale_copy_in_the_source_is_refused(folder: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    """The converter itself compares what is stored twice."""
    stale = tmp_path / "stale"
    shutil.copytree(saved["tied pp4 to tp2"], stale)
    stale_tie(stale)
    with pytest.raises(ckptconv.CkptconvError, match="output_layer"):
        reshard(stale, tmp_path / "out", side(2, tp=2))


def test_in_single_precision_all_follow_to_five_digits(folder: Path) -> None:
    models = {name: config.but(precision="fp32") for name, config in MODELS.items()}
    (there := folder / "fp32").mkdir()
    expected, found = never_stopped(models), second_halves(models, first_halves(models, there), there)
    far = {}
    for name, (model, *_) in PAIRS.items():
        pairs = zip(found[name], expected[model][SAVED:], strict=True)
        far[name] = max(abs(loss - wanted) for (loss, _), (wanted, _) in pairs)
    assert max(far.values()) < 1e-5
