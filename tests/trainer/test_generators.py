"""A run with dropout goes on as if it had not stopped where files of the same layout were made of its own: the generators are carried."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest

from ckptconv.trainer.config import Config, LayoutConfig
from ckptconv.trainer.launch import launch
from tests.trainer.runs import EXACT, KINDS, SAVED, STEPS, Curve, curve, distance
from tests.trainer.test_roundtrip import Side, reshard, side

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
CHAINS: dict[str, tuple[str, list[Side]]] = {
    "torch_dist again": ("dense", [side(2, tp=2, filed="torch_dist"), side(2, tp=2, filed="torch_dist")]),
    "rank files and back": ("dense", [side(2, tp=2, filed="torch_dist"), side(2, tp=2), side(2, tp=2, filed="torch_dist")]),
    "torch_dist of stages": ("dense", [side(2, pp=2), side(2, pp=2, filed="torch_dist")]),
    "torch_dist with experts dealt": ("experts", [side(2, ep=2, filed="torch_dist"), side(2, ep=2, filed="torch_dist")]),
}  # fmt: skip


def dropping(kind: str) -> Config:
    return replace(KINDS[kind], model=replace(KINDS[kind].model, dropout=0.1))


def run(config: Config, side: Side, load: Path | None = None, save: Path | None = None, steps: int = STEPS) -> Curve:
    return launch(side.world, partial(curve, side.of(config).but(steps=steps), load, save))[0]


@cache
def never_stopped(kind: str, layout: LayoutConfig) -> Curve:
    """The steps after those that are saved; files have no say in them."""
    return run(dropping(kind), Side(layout, 2))[SAVED:]


@pytest.mark.parametrize("name", CHAINS)
def test_dropout_goes_on(name: str, tmp_path: Path) -> None:
    kind, (first, *others) = CHAINS[name]
    config, at = dropping(kind), tmp_path / "0"
    run(config, first, save=at, steps=SAVED)
    for i, to in enumerate(others, 1):
        at = reshard(at, tmp_path / str(i), to)
    assert distance(run(config, others[-1], at), never_stopped(kind, first.layout)) < EXACT


def test_with_experts_dealt_rank_files_cannot_say_whose_they_are(tmp_path: Path) -> None:
    """Then the note tells so; a run goes on, and drops others."""
    config, dealt = dropping("experts"), side(2, ep=2)
    run(config, replace(dealt, filed="torch_dist"), save=tmp_path / "from", steps=SAVED)
    ranks = reshard(tmp_path / "from", tmp_path / "ranks", dealt)
    (note,) = json.loads((ranks / "ckptconv.json").read_text())["about"]["format_notes"]
    assert "numbered by replica of the model" in note
    assert distance(run(config, dealt, ranks), never_stopped("experts", dealt.layout)) > 1e-6
