"""I3: for every op, taking apart what was put together gives the same leaves, and both agree with numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptconv.dtypes import DTYPES
from ckptconv.leaves import contiguous
from ckptconv.ops import OPS, Concat, Op, Permute, Reshape, Rope, Stack
from ckptconv.source import Source
from ckptconv.tensor import Tensor

Array = NDArray[Any]


def rope(a: Array, heads: int) -> Array:
    """Half-split to interleaved, as the published Llama conversion permutes it backwards."""
    rows, columns = a.shape
    half = rows // heads // 2
    return a.reshape(heads, 2, half, columns).transpose(0, 2, 1, 3).reshape(rows, columns)


def grouped(arrays: list[Array], groups: int) -> Array:
    parts = [np.split(a, groups) for a in arrays]
    return np.concatenate([p[g] for g in range(groups) for p in parts])


CASES: list[tuple[Op, list[tuple[int, ...]], Callable[[list[Array]], Array]]] = [
    (Concat(), [(4, 3), (2, 3)], np.concatenate),
    (Concat(axis=1), [(4, 3), (4, 1)], lambda xs: np.concatenate(xs, 1)),
    (Concat(groups=2), [(8, 3), (2, 3), (2, 3)], lambda xs: grouped(xs, 2)),
    (Concat(groups=4), [(4,), (4,), (4,)], lambda xs: grouped(xs, 4)),
    (Stack(), [(2, 3), (2, 3), (2, 3)], np.stack),
    (Stack(axis=1), [(2, 3), (2, 3)], lambda xs: np.stack(xs, 1)),
    (Permute((1, 0)), [(4, 3)], lambda xs: xs[0].T),
    (Permute((2, 0, 1)), [(4, 3, 2)], lambda xs: xs[0].transpose(2, 0, 1)),
    (Reshape((6, -1)), [(4, 3, 2)], lambda xs: xs[0].reshape(6, -1)),
    (Reshape((24,)), [(4, 3, 2)], lambda xs: xs[0].reshape(24)),
    (Rope(2), [(8, 3)], lambda xs: rope(xs[0], 2)),
]


def test_every_op_has_a_case() -> None:
    assert {type(op).__name__.lower() for op, _, _ in CASES} == set(OPS)


def stored(folder: Path, arrays: list[Array]) -> list[Tensor]:
    made: list[Tensor] = []
    for i, array in enumerate(arrays):
        path = folder / f"{i}"
        path.write_bytes(array.tobytes())
        made.append(contiguous(Source(str(path), 0, array.nbytes), array.shape, DTYPES["int32"]))
    return made


@pytest.mark.parametrize(("op", "shapes", "reference"), CASES, ids=lambda x: repr(x) if not callable(x) else "")
def test_op_equals_numpy_and_inverts_to_the_same_leaves(
    tmp_path: Path, op: Op, shapes: list[tuple[int, ...]], reference: Callable[[list[Array]], Array]
) -> None:
    arrays = [np.arange(i * 1000, i * 1000 + math.prod(s), dtype=np.int32).reshape(s) for i, s in enumerate(shapes)]
    leaves = stored(tmp_path, arrays)
    whole = op.forward(leaves)
    assert whole.shape == op.shape(shapes) == reference(arrays).shape
    assert np.array_equal(whole.numpy(), reference(arrays))
    assert op.inverse(whole, shapes) == leaves


@settings(max_examples=100, deadline=None)
@given(groups=st.integers(1, 6), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), cut=st.data())
def test_grouped_concat_of_a_cut_is_a_cut_of_whole_groups(
    tmp_path_factory: pytest.TempPathFactory, groups: int, sizes: list[int], cut: st.DataObject
) -> None:
    """Cutting the operands by groups, then joining, is cutting the joined one: why ranks need no interleave flags."""
    arrays = [np.arange(i * 1000, i * 1000 + groups * n, dtype=np.int32) for i, n in enumerate(sizes)]
    leaves = stored(tmp_path_factory.mktemp("ops"), arrays)
    lo = cut.draw(st.integers(0, groups - 1))
    hi = cut.draw(st.integers(lo + 1, groups))
    part = Concat(groups=hi - lo).forward([t.narrow(0, lo * n, hi * n) for t, n in zip(leaves, sizes, strict=True)])
    whole = Concat(groups=groups).forward(leaves)
    row = sum(sizes)
    assert np.array_equal(part.numpy(), whole.narrow(0, lo * row, hi * row).numpy())


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (Concat(), [(4, 3), (4, 2)]),
        (Concat(groups=3), [(4, 3), (3, 3)]),
        (Stack(), [(4, 3), (4, 2)]),
        (Permute((1, 0)), [(4, 3, 2)]),
        (Reshape((5, -1)), [(4, 3)]),
        (Rope(3), [(8, 3)]),
    ],
)
def test_operands_that_do_not_fit_are_refused(op: Op, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"shape|heads"):
        op.shape(shapes)
