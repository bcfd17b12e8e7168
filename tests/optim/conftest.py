"""Runs of real Megatron-Core that tests share, each trained once per session, and its own files from elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.judge.conftest import hf
from tests.judge.optim import Run, Step
from tests.judge.ranks import Layout
from tests.optim.rank_runs import train_and_save

__all__ = ["hf"]

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = {  # name -> (model, layout, bf16, distributed optimizer)
    "dense": ("llama", Layout(tp=2, dp=2), True, True),
    "tied": ("llama-tied", Layout(pp=2, dp=2), True, True),
    "virtual": ("qwen2", Layout(tp=2, pp=2, vpp=2), True, True),
    "experts": ("mixtral", Layout(pp=2, ep=2), False, True),
    "lists": ("llama", Layout(tp=2, pp=2), True, False),
    "lists-fp32": ("llama-tied", Layout(pp=2), False, False),
    "lists-experts": ("mixtral", Layout(ep=2), True, False),
}


@dataclass(frozen=True)
class Trained:
    """An uninterrupted run, and what it saved on its way: rank files, and a distributed checkpoint of the same state."""

    run: Run
    steps: list[Step]
    folder: Path
    distributed: Path


Get = Callable[[str], Trained]


@pytest.fixture(scope="session")
def trained(hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Get:
    """trained("tied") -> that run."""
    made: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in made:
            kind, layout, bf16, distributed = RUNS[name]
            run, folder = Run(hf(kind), layout, bf16, distributed), tmp_path_factory.mktemp(name)
            again = folder / "distributed"
            made[name] = Trained(run, train_and_save(run, folder / "ranks", again), folder / "ranks", again)
        return made[name]

    return get


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Megatron-Core's distributed optimizer, made elsewhere: rank files and flat buffers."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN / "mlm" / "opt-legacy-bf16-tp2pp1dp2-distopt", folder, dirs_exist_ok=True)
    shutil.copytree(GOLDEN / "optim" / "distopt-bf16-tp2dp2", folder, dirs_exist_ok=True)
    return folder
