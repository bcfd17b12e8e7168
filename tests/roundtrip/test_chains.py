"""Long chains of unlike layouts: every stop is the model it started as, and the last one is the first bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptconv
from ckptconv.testing.models import make_hf, make_model
from tests.roundtrip.plain_slices import Grid, Model, Tensors, check_ranks, read_safetensors

LOCAL = {"transformer_impl": "local"}
LAYERS = 12


@dataclass(frozen=True)
class Stop:
    """One conversion of a chain. `grid` is set where the rank files are also held against plain slices of the weights."""

    saver: str
    layout: dict[str, Any] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    grid: Grid | None = None


def mcore(options: Mapping[str, object] | None = None, grid: Grid | None = None, **layout: Any) -> Stop:
    return Stop("mcore", layout, options or {}, grid)


def legacy(grid: Grid | None = None, **layout: Any) -> Stop:
    return Stop("legacy", layout, {}, grid)


DENSE = [
    mcore(tp=2, pp=2, grid=Grid(2, (6, 6), 2)),
    mcore(tp=4, grid=Grid(4, (12,))),  # more ranks than key/value heads
    mcore(pp=3, pp_layers=(3, 4, 5), grid=Grid(1, (3, 4, 5), 3)),
    mcore(tp=2, pp=2, vpp=2, grid=Grid(2, (3, 3, 3, 3), 2)),
    legacy(tp=2, pp=2, grid=Grid(2, (6, 6), 2)),
    legacy(pp=4, vpp=3, grid=Grid(1, (1,) * 12, 4)),
    mcore(LOCAL, tp=2, pp=3, vpp=2),
    mcore(LOCAL, tp=4, pp=2, grid=Grid(4, (6, 6), 2)),
    mcore(pp=2, vpp=2, pp_layers=(2, 4, 3, 3), grid=Grid(1, (2, 4, 3, 3), 2)),
    Stop("hf", options={"max_shard_size": "150KB"}),
    mcore({"mcore_version": "0.9", "te_version": "1.8"}, tp=2),
    legacy(),
    mcore(pp=12),
    mcore(LOCAL, tp=2, pp=4, pp_layers=(1, 4, 4, 3)),
    Stop("hf"),
]
MOE = [
    Stop("hf", options={"max_shard_size": "200KB"}),  # as the source: experts fused
    mcore(tp=2, pp=2, ep=2, etp=1, grid=Grid(2, (3, 3), 2, 2, 1)),
    mcore({"experts": "sequential"}, pp=3, pp_layers=(1, 2, 3), ep=4, grid=Grid(1, (1, 2, 3), 3, 4)),
    mcore({"experts": "grouped"}, tp=4, ep=2, etp=2, grid=Grid(4, (6,), 1, 2, 2)),
    mcore({"experts": "grouped", **LOCAL}, tp=2, pp=2, ep=4, etp=1, grid=Grid(2, (3, 3), 2, 4, 1)),
    mcore({"experts": "sequential", **LOCAL}, tp=2, pp=3, vpp=2, ep=2, grid=Grid(2, (1,) * 6, 3, 2)),
    Stop("hf"),
    mcore({"experts": "te-grouped"}, tp=2, pp=2, pp_layers=(4, 2), ep=4, etp=2, grid=Grid(2, (4, 2), 2, 4, 2)),
    mcore({"experts": "grouped"}, pp=2, vpp=3, ep=4, grid=Grid(1, (1,) * 6, 2, 4)),
    Stop("hf", options={"max_shard_size": "200KB"}),
]


def travel(start: Path, chain: list[Stop], room: Path, model: Model) -> list[Path]:
    """The folders of a chain, each made from the one before it and compared with the first."""
    folders = [start]
    for number, stop in enumerate(chain):
        dst = room / f"{number:02d}-{stop.saver}"
        ckptconv.convert(
            folders[-1],
            dst,
            saver=stop.saver,
            saver_options=stop.options,
            execute_options=ckptconv.ExecuteOptions(durable=False),
            **stop.layout,
        )
        verdict = ckptconv.verify(start, dst)
        assert verdict.same, f"{dst.name}: {verdict.differences[:3]}"
        if stop.grid is not None:
            assert check_ranks(dst, model, stop.grid, legacy=stop.saver == "legacy") >= 4 * sum(stop.grid.stages)
        folders.append(dst)
    return folders


def forms(folders: list[Path]) -> set[str]:
    """What the results say of their layouts: how many there are that differ."""
    told = [json.loads((folder / "ckptconv.json").read_text())["about"]["result"] for folder in folders]
    return {json.dumps(form, sort_keys=True) for form in told}


def check_equal(found: Tensors, wanted: Tensors) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("kind", ["llama-bias", "llama-tied"])
def test_dense_chain_ends_where_it_began(kind: str, tmp_path: Path) -> None:
    start = make_hf(tmp_path / "start", kind, dtype="bfloat16", num_hidden_layers=LAYERS)
    folders = travel(start, DENSE, tmp_path, Model(start))
    assert len(forms(folders[1:])) >= 14
    check_equal(read_safetensors(folders[-1]), read_safetensors(start))
    assert json.loads((folders[-1] / "config.json").read_text()) == json.loads((start / "config.json").read_text())


def test_moe_chain_ends_where_it_began(tmp_path: Path) -> None:
    """It starts with fused experts and ends with them apart; transformers wrote the same model both ways."""
    model = make_model("mixtral", num_hidden_layers=6).to(torch.bfloat16)
    fused, apart = tmp_path / "fused", tmp_path / "apart"
    model.save_pretrained(fused, save_original_format=False)
    model.save_pretrained(apart)
    folders = travel(fused, MOE, tmp_path, Model(apart))
    assert len(forms(folders[1:])) >= 9
    check_equal(read_safetensors(folders[1]), read_safetensors(fused))
    check_equal(read_safetensors(folders[-1]), read_safetensors(apart))
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_safetensors(fused)
