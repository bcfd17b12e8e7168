"""Runs that Megatron-Core trains once per session, each saved in several forms of optimizer state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.judge.optim import OLD, PLAIN, Run, Step, train_and_save
from tests.judge.ranks import Layout
from tests.mcore_dist.old_megatron import OldMegatron

FULLY, BUCKETS, ZERO = "fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter"


@dataclass(frozen=True)
class Case:
    """A model, the layout it is trained at, and the forms in which the same state is saved."""

    kind: str
    layout: Layout
    forms: tuple[str, ...] = (FULLY, BUCKETS, ZERO)
    bf16: bool = True
    backend: str = "torch_dist"


CASES = {
    "dense": Case("llama", Layout(tp=2, dp=2)),
    "tied": Case(
        "llama-tied", Layout(pp=2, dp=2)
    ),  # the first and last stage keep the embedding in a bucket of its own
    "virtual": Case("qwen2", Layout(tp=2, pp=2, vpp=2), (FULLY, BUCKETS)),
    "experts": Case("mixtral", Layout(pp=2, ep=2)),  # an optimizer of their own: chained
    "experts-together": Case("mixtral", Layout(pp=2, dp=2), (FULLY, ZERO), bf16=False),
    "plain": Case("llama", Layout(tp=2, pp=2), (PLAIN,)),
    "plain-fp32": Case("llama-tied", Layout(pp=2), (PLAIN,), bf16=False),
    "alone": Case("llama", Layout(), (FULLY,)),
    "plain-experts": Case("mixtral", Layout(ep=2), (PLAIN,)),
    "old": Case("llama", Layout(tp=2, dp=2), (OLD,)),
    "old-experts": Case("mixtral", Layout(ep=2, dp=2), (OLD,)),
    "old-plain": Case("mixtral", Layout(ep=2), (PLAIN,)),
    "old-zarr": Case(
        "llama", Layout(tp=2, dp=2), (OLD,), backend="zarr"
    ),  # ranks write their parts of a chunk by turns
}


@dataclass(frozen=True)
class Trained:
    """An uninterrupted run, and what it saved on its way, by form."""

    run: Run
    steps: list[Step]
    places: dict[str, Path]


Get = Callable[[str], Trained]


@pytest.fixture(scope="session")
def trained(hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Get:
    """trained("tied") -> that run. Cases that are old are Megatron-Core 0.12's."""
    made: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp(name)
            places = {form: folder / form for form in case.forms}
            run = Run(hf(case.kind), case.layout, case.bf16, PLAIN not in case.forms, backend=case.backend)
            made[name] = Trained(run, _train(request, name, run, places), places)
        return made[name]

    return get


def _train(request: pytest.FixtureRequest, name: str, run: Run, places: dict[str, Path]) -> list[Step]:
    if not name.startswith("old"):
        return train_and_save(run, places)
    megatron: OldMegatron = request.getfixturevalue("old_megatron")
    return megatron.train(run, places)
