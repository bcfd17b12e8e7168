"""What Megatron-LM's own tools made of towers, and of language models with them: every tensor and name, and the way back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from ckptconv.mapping_files import load_mapping
from tools.golden_table import Check
from tools.golden_vlm import OMITTED, TOWERS, Tower, checks, official, tower_back
from tools.make_vlm_manifests import CASES
from tools.rank_files import leaf

FOLDER = Path(__file__).parent / "vlm"
LIMIT = 2_500_000
OURS = "nvlm_d"  # built by hand: no tool made it, and no check here takes it for a golden
CHECKS = list(checks(FOLDER))


def test_goldens_are_all_here_and_small() -> None:
    """A manifest or files for each; each of the tools: four converters of towers, combine, stages cut and joined."""
    assert {title for title, _, _ in CHECKS} == {*CASES, "radio_g/tp2_te"}
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.relative_to(FOLDER).parts[0] != OURS]
    assert sum(path.stat().st_size for path in files) <= LIMIT


@pytest.mark.parametrize("check", [pytest.param(check, id=f"{title} {what}") for title, what, check in CHECKS])
def test_ours_is_what_the_official_tool_made(check: Check, tmp_path: Path) -> None:
    assert check(tmp_path / "out") == []


def test_what_has_no_place_is_what_the_mapping_says() -> None:
    """CLIP's last norm and its projection; nothing else of any tower's source, as the checks of the way back show."""
    assert TOWERS["clip"].dropped == OMITTED
    assert not any(tower.dropped for name, tower in TOWERS.items() if name != "clip")
    assert {name for name in OMITTED if load_mapping("mcore-vision-local").omits(name)} == set(OMITTED)


def test_dummy_heads_lie_where_the_official_tool_puts_them() -> None:
    """25 heads of 4 entries on 8 ranks: four heads each, of which rank 6 has one real and rank 7 none."""
    found = official(FOLDER / "internvit/tp8_te")
    name = "model/decoder.layers.0.self_attention.linear_proj.weight"
    empty = leaf(torch.zeros(100, 16))
    assert [found[f"mp_rank_{rank:02d}"][name] == empty for rank in range(8)] == [False] * 7 + [True]


def test_the_comparison_sees_what_is_dropped_beyond_the_list(tmp_path: Path) -> None:
    tower = TOWERS["clip"]
    careless = Tower(tower.name, tower.source, tower.family, tower.heads, tower.given, OMITTED[:2])
    check = partial(tower_back, careless, FOLDER / tower.source, FOLDER / "clip/tp2_te")
    assert check(tmp_path / "out") == ["not in the official file: projection.weight"]
