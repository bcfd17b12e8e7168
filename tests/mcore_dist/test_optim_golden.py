"""Optimizer state that Megatron-Core 0.12 flattened, made elsewhere: today's goes on from it; what is wrong with such files is told."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptconv
from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, Key
from ckptconv.containers import dcp
from ckptconv.containers.dcp_flat import restored
from ckptconv.dtypes import FP32
from ckptconv.errors import FormatError
from ckptconv.formats import Request
from ckptconv.formats.mcore_dist import McoreDist, McoreDistLoad
from ckptconv.leaves import contiguous, full
from ckptconv.source import Source
from tests.judge.optim import SAVED_AT, Run, resume
from tests.judge.ranks import Layout

GOLDEN = Path(__file__).parents[1] / "golden" / "optim" / "mcore0.12-flattened"
RUN = Run(GOLDEN / "hf", rows=64)


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2), Layout(tp=2, pp=2)], ids=lambda at: at.name)
def test_todays_megatron_core_goes_on_from_it(layout: Layout, tmp_path: Path) -> None:
    ckptconv.convert(GOLDEN, tmp_path / "new", saver_options={"transformer_impl": "local"})
    steps = resume(replace(RUN, layout=layout), tmp_path / "new")
    losses = [loss for loss, _ in json.loads((GOLDEN / "steps.json").read_text())[SAVED_AT:]]
    np.testing.assert_allclose([loss for loss, _ in steps], losses, rtol=0, atol=2e-6)


def test_every_weight_has_its_slots_and_is_its_rounded_master() -> None:
    whole = canonicalize(McoreDist().load(GOLDEN, McoreDistLoad(), Request(training=True)))
    names = {key.name for key in whole.tensors}
    assert set(whole.tensors) == {Key(n, slot) for n in names for slot in ("param", MASTER, EXP_AVG, EXP_AVG_SQ)}
    for name in names:
        weight, master = (np.asarray(whole.tensors[Key(name, slot)].numpy()) for slot in ("param", MASTER))
        np.testing.assert_array_equal(master.astype(weight.dtype), weight)
    assert whole.extras.training is not None
    assert whole.extras.training.updates == SAVED_AT
    assert [group["wd_mult"] for group in whole.extras.training.groups] == [1.0, 0.0]


def test_state_that_is_not_wanted_is_only_told() -> None:
    stored = McoreDist().load(GOLDEN, McoreDistLoad(), Request())
    assert {key.slot for tensors in stored.ranks.values() for key in tensors} == {"param"}
    assert stored.extras.training is None
    assert "learning rate scheduler" in stored.extras.state


MOMENT = "optimizer.state.exp_avg.output_layer.weight"
Stored = dict[str, Any]


def lose(held: Stored) -> None:
    del held[MOMENT]


def of_no_weight(held: Stored) -> None:
    held["optimizer.state.exp_avg.head.weight"] = held.pop(MOMENT)


def of_no_adam(held: Stored) -> None:
    held["optimizer.state.momentum.output_layer.weight"] = held.pop(MOMENT)


def twice(held: Stored) -> None:
    held[f"chained_1.{MOMENT}"] = held[MOMENT]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose, r"missing: output_layer\.weight \[exp_avg\]"),
        (of_no_weight, r"of no weight: head\.weight"),
        (of_no_adam, r"not known, such as optimizer\.state\.momentum"),
        (twice, rf"{MOMENT}: is the same slot of the same parameter as .*{MOMENT}, expected one"),
    ],
    ids=["missing", "stray", "unknown", "twice"],
)
def test_state_that_is_not_the_models_is_refused(
    change: Callable[[Stored], None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = dcp.read

    def other(folder: Path) -> Any:
        found = read(folder)
        tensors = dict(found.tensors)
        change(tensors)
        return replace(found, tensors=tensors)

    monkeypatch.setattr(dcp, "read", other)
    with pytest.raises(FormatError, match=said):
        McoreDist().load(GOLDEN, McoreDistLoad(), Request(training=True))


def test_moments_whose_updates_nobody_counted_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "uncounted"
    shutil.copytree(GOLDEN, folder)
    common = folder / "iter_0000002" / "common.pt"
    common.chmod(0o600)
    saved = torch.load(common, weights_only=False)
    for group in saved["optimizer"]["optimizer"]["param_groups"]:
        del group["step"]
    torch.save(saved, common)
    with pytest.raises(FormatError, match="has moments, but no step in its param groups"):
        McoreDist().load(folder, McoreDistLoad(), Request(training=True))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4))
def test_shards_of_any_grid_come_back(axes: list[tuple[int, int]]) -> None:
    """Shards as numpy cuts them, each flat, on a grid."""
    grid, shard, shape = (tuple(sizes) for sizes in zip(*((g, n, g * n) for g, n in axes), strict=True))
    whole = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    flat = np.empty((*grid, math.prod(shard)), np.float32)
    for place in np.ndindex(*grid):
        cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, shard, strict=True))
        flat[place] = whole[cut].ravel()
    with NamedTemporaryFile() as file:
        file.write(flat.tobytes())
        file.flush()
        tensor = contiguous(Source(file.name, 0, flat.nbytes), flat.shape, FP32)
        np.testing.assert_array_equal(restored(tensor, shape, "it").numpy(), whole)


@pytest.mark.parametrize("shape", [(), (8,), (4, 5), (3, 4), (4, 8)])
def test_shapes_that_the_shards_do_not_make_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match="no shards of a tensor of shape"):
        restored(full((2, 2, 4), FP32, 0), shape, "it")
