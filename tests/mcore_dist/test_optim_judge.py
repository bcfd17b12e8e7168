"""The judge of optimizer states judged: Megatron-Core goes on from what it saved itself as if it had not stopped."""

from __future__ import annotations

import pytest

from tests.judge.optim import OLD, SAVED_AT, resume
from tests.mcore_dist.optim_runs import CASES, Get

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("old")])
def test_it_goes_on_exactly_from_every_form(name: str, trained: Get) -> None:
    there = trained(name)
    for place in there.places.values():
        assert resume(there.run, place) == there.steps[SAVED_AT:]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if OLD in case.forms])
def test_its_old_form_is_refused_by_newer_ones(name: str, trained: Get) -> None:
    there = trained(name)
    (place,) = there.places.values()
    with pytest.raises(RuntimeError, match=r"flattened|zarr"):
        resume(there.run, place)
