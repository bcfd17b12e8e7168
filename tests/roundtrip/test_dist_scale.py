"""Distributed checkpoints of the largest models are planned in seconds, and converting one takes little memory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch

from ckptconv.containers.dcp_metadata import NAME
from tests.roundtrip import dist_holes, headers
from tests.roundtrip.dist_holes import ITERATION, Mixture
from tests.roundtrip.fresh import measured
from tests.roundtrip.test_planning_scale import planned
from tests.unit.helpers.dcp import load

SECONDS, BYTES = 30, 2 * 10**9
STAGES = (4,) * 13 + (3,) * 3
TRILLION = Mixture(61, 7168, heads=64, kv_heads=8, head_dim=128, vocab=129024, experts=384, ffn=2048, stages=STAGES)
SMALL = Mixture(
    3, 16, heads=4, kv_heads=2, head_dim=4, vocab=128, experts=4, ffn=8, stages=(2, 1), tp=2, ep=4
)  # in all else alike
BOUND = 64 * 10**6


def test_a_trillion_parameters_with_experts_are_planned_in_half_a_minute(tmp_path: Path) -> None:
    """To as many ranks as saved it: 16 stages of 64 processes, each with 6 of the 384 experts."""
    source = dist_holes.write(tmp_path / "source", TRILLION)
    parameters = sum(math.prod(told) for told in shapes_of(TRILLION))
    layout = {"tp": 8, "pp": 16, "ep": 64, "etp": 1, "pp_layers": ",".join(map(str, STAGES))}
    found = planned(source, json.dumps(layout), SECONDS)
    told = (source / ITERATION / NAME).stat().st_size
    shutil.rmtree(source)  # half a gigabyte of headers
    assert parameters > 10**12
    assert found["bytes"] > 2 * parameters
    assert found["files"] == 16 * 64 + 1
    assert found["tensors"] >= 61 * (2 * 384 + 64 * 5)
    assert found["seconds"] < SECONDS
    assert found["peak"] < BYTES
    assert found["read"] < told + 8_000 * 61 * 384 * 3  # of each chunk's megabytes the headers, by pages


def shapes_of(m: Mixture) -> list[tuple[int, ...]]:
    """Experts, attention, vocabulary; norms do not count."""
    rows = (2 * m.heads + 2 * m.kv_heads) * m.head_dim
    return [(m.layers, m.experts, 3, m.ffn, m.hidden), (m.layers, rows, m.hidden), (2, m.vocab, m.hidden)]


def test_such_a_checkpoint_is_one_for_torch_too(tmp_path: Path) -> None:
    """A small one in torch's own reader: all of it is there, and zero."""
    source = dist_holes.write(tmp_path / "source", SMALL)
    found = load(source / ITERATION)
    assert found["decoder.layers.mlp.experts.experts.linear_fc1.weight"].shape == (3, 4, 16, 16)
    assert {name: int(tensor.count_nonzero()) for name, tensor in found.items()} == dict.fromkeys(found, 0)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert len(found) == 10


def test_conversions_both_ways_keep_to_the_memory_bound(tmp_path: Path) -> None:
    """torch_dist of 200 MB and rank files, each step in a fresh process; the weights of the first source are holes."""
    config, shapes = headers.llama(8, hidden=1024, ffn=2816, heads=16, kv_heads=8, vocab=8000)
    assert sum(map(headers.nbytes, shapes.values())) > 200 * 10**6
    source = headers.write(tmp_path / "hf", config, shapes)
    steps = [("mcore-dist", {}), ("mcore", {"tp": 2, "pp": 2}), ("mcore-dist", {}), ("hf", {})]
    for number, (saver, layout) in enumerate(steps):
        target = tmp_path / str(number)
        found = measured("convert", source, target, saver, json.dumps(layout), BOUND)
        assert found["written"] > 200 * 10**6
        assert found["peak"] < 60 * 10**6 + BOUND + 2_000 * found["tensors"], saver
        shutil.rmtree(source)
        source = target
