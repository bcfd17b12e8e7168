"""Tensors cross to torch bit for bit, whatever the dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ckptconv.dtypes import DTYPES
from ckptconv.leaves import contiguous
from ckptconv.nodes import Fill
from ckptconv.source import whole
from ckptconv.torch_bridge import to_torch


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_keeps_its_bits(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    bits = np.random.default_rng(1).integers(0, 2, 6 * dtype.itemsize).astype(np.uint8)
    (tmp_path / "x").write_bytes(bits.tobytes())
    tensor = to_torch(contiguous(whole(str(tmp_path / "x")), (2, 3), dtype).permute([1, 0]))
    assert tensor.dtype == getattr(torch, dtype.torch)
    assert tensor.shape == (3, 2)
    assert tensor.T.contiguous().view(torch.uint8).numpy().tobytes() == bits.tobytes()


def test_scalar_and_empty() -> None:
    assert to_torch(Fill((), DTYPES["fp32"], 0)).item() == 0
    assert to_torch(Fill((0, 3), DTYPES["bf16"])).shape == (0, 3)
