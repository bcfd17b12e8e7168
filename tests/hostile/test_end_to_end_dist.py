"""Damaged and hostile distributed checkpoints, end to end: refused by name, quickly, in little memory, nothing left behind."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ckptconv import convert
from ckptconv.testing.checkpoints import write_hf
from tests.hostile import damage_dist, damage_dist_blobs, damage_zarr
from tests.hostile.bases import QUICK
from tests.hostile.damage import Case
from tests.hostile.test_end_to_end import check_refused

MATRIX: list[Case] = [*damage_dist.CASES, *damage_dist_blobs.CASES, *damage_zarr.CASES]
ZARR = {"backend": "zarr", "mcore_version": "0.12"}
# name -> (what of the model is unlike the others', how it is saved)
MADE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dist": ({}, {"files": 2}),
    "dist other": ({"seed": 7}, {"files": 2}),
    "dist wide": ({"intermediate_size": 64}, {"files": 2}),
    "dist separate": ({}, {"files": 2, "layers": "separate"}),
    "zarr": ({}, ZARR),
    "zarr other": ({"seed": 7}, ZARR),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each clean checkpoint by name."""
    root = tmp_path_factory.mktemp("bases")
    for name, (model, options) in MADE.items():
        hf = write_hf(root / f"hf of {name}", num_hidden_layers=4, **model)
        (hf / "tokenizer.json").write_text("{}")
        convert(hf, root / name, saver="mcore-dist", saver_options=options, execute_options=QUICK)
    return {name: root / name for name in MADE}


@pytest.fixture(scope="module")
def clean(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the undamaged checkpoints are converted to."""
    root = tmp_path_factory.mktemp("clean")
    for base in ("dist", "zarr"):
        convert(bases[base], root / base, saver="hf", execute_options=QUICK, check=True)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in MATRIX])
def test_damage_is_refused(
    case: Case, bases: dict[str, Path], clean: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(case, bases, clean, tmp_path, monkeypatch)


def test_matrix_is_large_and_each_case_once() -> None:
    kinds = Counter(case.kind for case in MATRIX)
    assert len(kinds) >= 25
    assert len(MATRIX) >= 300
    assert len({case.id for case in MATRIX}) == len(MATRIX)
    assert all(case.named and all(case.named) for case in MATRIX if not case.harmless), "each names what is wrong"
