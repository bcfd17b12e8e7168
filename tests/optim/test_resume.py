"""Real Megatron-Core goes on from converted rank files, at other layouts and with other optimizers, as if it had not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.judge.optim import SAVED_AT, Step
from tests.judge.ranks import Layout
from tests.optim.conftest import RUNS, Get
from tests.optim.convert import at, moved
from tests.optim.rank_runs import FLAT_FILE, RANK_FILE, resume

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]

# Losses are some 5.6, told in fp32: 1e-6 are two of its last digits. Other sums over tensor ranks in bf16 change the fourth digit,
# as they do between Megatron-Core's own runs at these layouts.
EXACT, ROUNDED = 1e-6, 2e-3
LISTS, FLAT = False, True
MOVES = [
    ("dense", Layout(tp=2, pp=2), FLAT, EXACT),
    ("dense", Layout(tp=2), LISTS, EXACT),
    ("dense", Layout(), FLAT, ROUNDED),
    ("tied", Layout(dp=2), FLAT, EXACT),
    ("tied", Layout(pp=4), LISTS, EXACT),
    ("virtual", Layout(tp=2), LISTS, EXACT),
    ("virtual", Layout(tp=2, pp=2), FLAT, EXACT),
    ("experts", Layout(pp=2), FLAT, EXACT),
    ("experts", Layout(ep=4), LISTS, EXACT),
    ("lists", Layout(tp=2, dp=2), FLAT, EXACT),
    ("lists", Layout(pp=2, vpp=2), FLAT, ROUNDED),
    ("lists-fp32", Layout(tp=2), LISTS, EXACT),
    ("lists-fp32", Layout(dp=2), FLAT, EXACT),
    ("lists-experts", Layout(ep=2, dp=2), FLAT, EXACT),
    ("lists-experts", Layout(pp=2), LISTS, ROUNDED),
]


def apart(a: list[Step], b: list[Step]) -> float:
    """How far two runs' losses are from each other."""
    return max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", RUNS)
def test_it_goes_on_from_what_it_saved(name: str, trained: Get) -> None:
    there = trained(name)
    assert resume(there.run, there.folder) == there.steps[SAVED_AT:]


@pytest.mark.parametrize(
    ("name", "layout", "flat", "tolerance"),
    MOVES,
    ids=[f"{n}-{x.name}-{'flat' if f else 'lists'}" for n, x, f, _ in MOVES],
)
def test_it_goes_on_elsewhere(
    name: str, layout: Layout, flat: bool, tolerance: float, trained: Get, tmp_path: Path
) -> None:
    there = trained(name)
    run = at(there, layout, distributed=flat)
    steps = resume(run, moved(there, run, tmp_path / "out"))
    assert apart(steps, there.steps[SAVED_AT:]) <= tolerance


def edit(folder: Path, file: str, change: Any) -> None:
    for path in folder.rglob(file):
        saved = torch.load(path, weights_only=False)
        change(saved)
        torch.save(saved, path)


def swap_moments(saved: dict[str, Any]) -> None:
    """Of two layers' matrices of the same shape."""
    state = saved["optimizer"]["optimizer"]["state"]
    same = [i for i in state if state[i]["exp_avg"].shape == state[1]["exp_avg"].shape]
    first, second = state[same[0]], state[same[1]]
    first["exp_avg"], second["exp_avg"] = second["exp_avg"], first["exp_avg"]


def miscount(saved: dict[str, Any]) -> None:
    for held in saved["optimizer"]["optimizer"]["state"].values():
        held["step"] += 1


def shift(saved: dict[Any, Any]) -> None:
    (flat,) = saved[0].values()
    flat["exp_avg_sq"] = torch.roll(flat["exp_avg_sq"], 64)


@pytest.mark.parametrize(
    ("flat", "file", "change"),
    [(LISTS, RANK_FILE, swap_moments), (LISTS, RANK_FILE, miscount), (FLAT, FLAT_FILE, shift)],
    ids=["moments of two layers swapped", "a count of updates too many", "a buffer off by 64 elements"],
)
def test_it_would_show(flat: bool, file: str, change: Any, trained: Get, tmp_path: Path) -> None:
    """The same way with one thing wrong in the result leads elsewhere."""
    there = trained("lists")
    run = at(there, Layout(tp=2), distributed=flat)
    out = moved(there, run, tmp_path / "out")
    edit(out, file, change)
    assert apart(resume(run, out), there.steps[SAVED_AT:]) > 10 * EXACT


def test_a_buffer_of_another_size_is_refused_by_it(trained: Get, tmp_path: Path) -> None:
    """So a layout of buffers that is wrong is not loaded in silence."""
    there = trained("dense")
    out = moved(there, at(there, Layout(tp=2)), tmp_path / "out")

    def longer(saved: dict[Any, Any]) -> None:
        (flat,) = saved[0].values()
        flat["numel_unpadded"] += 64

    edit(out, FLAT_FILE, longer)
    with pytest.raises(RuntimeError, match="unpadded elements must be same"):
        resume(at(there, Layout(tp=2)), out)
