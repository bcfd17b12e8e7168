"""Neighbours that look as if they could be one node, and are not: joined, they hold what numpy's concatenation does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckptconv.dtypes import DTYPES, FP16, FP32
from ckptconv.leaves import full, view
from ckptconv.nodes import concat
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.values import Cast

U16 = DTYPES["uint16"]
DATA = np.arange(64, dtype=np.uint16)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "data").write_bytes(DATA.tobytes())
    return Source(str(tmp_path / "data"), 0, DATA.nbytes)


def strided(source: Source, at: int, *axes: tuple[int, int]) -> Tensor:
    """Elements from `at` on; each axis has a size and a stride."""
    sizes, strides = zip(*axes, strict=True)
    return view(source, 2 * at, sizes, tuple(2 * s for s in strides), U16)


def test_windows_of_other_strides_stay_apart(source: Source) -> None:
    """The second begins where the first would go on."""
    joined = concat([strided(source, 0, (2, 2)), strided(source, 4, (2, 3))], 0)
    assert joined.numpy().tolist() == [0, 2, 4, 7]


def test_constants_of_other_values_stay_apart() -> None:
    joined = concat([full((2,), FP32, 1.0), full((1,), FP32, 2.0)], 0)
    assert joined.numpy().tolist() == [1, 1, 2]


def test_functions_that_differ_stay_apart(source: Source) -> None:
    """Two windows next to each other, cast to one dtype from two."""
    bf16 = DTYPES["bf16"]
    halves = view(source, 0, (2,), (2,), FP16).map(Cast(FP16, FP32), FP32)
    brains = view(source, 4, (2,), (2,), bf16).map(Cast(bf16, FP32), FP32)
    wanted = np.concatenate(
        [DATA[:2].view(np.float16).astype(np.float32), DATA[2:4].view(bf16.numpy).astype(np.float32)]
    )
    assert concat([halves, brains], 0).numpy().tobytes() == wanted.tobytes()


def test_folds_of_other_rows_stay_apart(source: Source) -> None:
    """Six rows each, folded from 2 x 3 and from 3 x 2, the strides alike and the columns adjacent."""
    one, two = strided(source, 0, (2, 20), (3, 4), (2, 1)), strided(source, 2, (3, 20), (2, 4), (2, 1))
    columns = [np.array([[20 * i + 4 * j + k + at for k in (0, 1)] for i in range(n) for j in range(m)])
               for at, n, m in ((0, 2, 3), (2, 3, 2))]  # fmt: skip
    joined = concat([one.fold(0), two.fold(0)], 1)
    np.testing.assert_array_equal(joined.numpy(), np.concatenate(columns, 1))
