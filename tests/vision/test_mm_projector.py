"""Projectors trained alone: what torch saved is read in every form, and what is no projector is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckptconv.errors import CkptconvError
from ckptconv.pipeline import load

SHAPES = {"0.weight": (80, 48), "0.bias": (80,), "2.weight": (64, 80), "2.bias": (64,)}
LINEAR = {"weight": (64, 48), "bias": (64,)}


def saved(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    rng = np.random.default_rng(5)
    state = {f"model.mm_projector.{name}": torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}
    path = folder / "mm_projector.bin"
    torch.save({name: value.half() for name, value in state.items()}, path)
    return path


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("shapes", [SHAPES, LINEAR])
def test_one_layer_or_two_with_biases_or_without(
    shapes: dict[str, tuple[int, ...]], biases: bool, tmp_path: Path
) -> None:
    path = saved(tmp_path, {name: shape for name, shape in shapes.items() if biases or name.endswith("weight")})
    expected = torch.load(path)
    found = load(path).tensors
    assert sorted(t.numpy().tobytes() for t in found.values()) == sorted(t.numpy().tobytes() for t in expected.values())
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**LINEAR, "weight": (64,)}, "weight"),
        ({**SHAPES, "0.weight": (80,)}, "0.weight"),
        ({**SHAPES, "2.weight": (64, 81)}, "2.weight"),
        ({**SHAPES, "2.bias": (63,)}, "2.bias"),
        ({name: shape for name, shape in SHAPES.items() if name != "2.weight"}, "2.weight"),
        ({name: shape for name, shape in SHAPES.items() if name != "0.bias"}, "2.bias"),
        ({**SHAPES, **LINEAR}, "weight"),
        ({**SHAPES, "4.weight": (64, 64)}, "no projector"),
    ],
)
def test_what_does_not_fit_is_named(shapes: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    with pytest.raises(CkptconvError, match=said):
        load(saved(tmp_path, shapes), loader="mm-projector")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, SHAPES)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CkptconvError, match=r"mm_projector\.bin"):
        load(path, loader="mm-projector")
