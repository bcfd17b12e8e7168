"""Two Hugging Face folders compared, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.judge.fill import same_bits


def assert_same(found: Path, wanted: Path) -> None:
    """The same names, shapes, dtypes and bits."""
    have, want = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert sorted(have) == sorted(want)
    assert [name for name in want if have[name].dtype != want[name].dtype] == []
    assert [name for name in want if not same_bits(_raw(have[name]), _raw(want[name]))] == []


def _raw(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """Its bytes, along the last axis: numpy alone knows no bfloat16."""
    raw: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return raw
