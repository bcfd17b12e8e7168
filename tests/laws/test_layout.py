"""I2, I3: random programs of layout methods over random tilings read as numpy computes them, and cutting then joining is the identity."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptconv.assemble import assemble
from ckptconv.dtypes import DTYPES
from ckptconv.leaves import contiguous
from ckptconv.nodes import Concat, Fill, Fold, Map, View, concat
from ckptconv.source import Source
from ckptconv.tensor import Tensor

U16 = DTYPES["uint16"]
Array = NDArray[Any]


class Pool:
    """A scratch file that hands out stored arrays as Views."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb")
        self.at = 0

    def store(self, array: Array) -> Tensor:
        data = np.ascontiguousarray(array).tobytes()
        self.file.write(data)
        self.file.flush()
        self.at += len(data)
        return contiguous(Source(str(self.path), self.at - len(data), len(data)), array.shape, U16)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("laws") / "pool.bin")
    yield made
    made.file.close()


def tiled(pool: Pool, array: Array, rng: random.Random) -> Tensor:
    """The array as a random guillotine tiling of separately stored chunks."""
    parts: list[tuple[tuple[int, ...], Tensor]] = []

    def cut(box: list[tuple[int, int]]) -> None:
        axis = rng.randrange(array.ndim)
        lo, hi = box[axis]
        if hi - lo > 1 and rng.random() < 0.75 and len(parts) < 40:
            at = rng.randint(lo + 1, hi - 1)
            cut([*box[:axis], (lo, at), *box[axis + 1 :]])
            cut([*box[:axis], (at, hi), *box[axis + 1 :]])
        else:
            chunk = array[tuple(slice(*b) for b in box)]
            parts.append((tuple(b[0] for b in box), pool.store(chunk)))

    cut([(0, n) for n in array.shape])
    rng.shuffle(parts)
    return assemble(array.shape, parts)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def step(pool: Pool, t: Tensor, a: Array, rng: random.Random) -> tuple[Tensor, Array]:
    """One random layout method on both sides."""
    kind = rng.choice(
        ["narrow", "permute", "unfold", "fold", "concat", "expand", "unsqueeze", "squeeze", "empty", "split"]
    )
    axis = rng.randrange(a.ndim) if a.ndim else 0
    if a.ndim == 0:
        return t.unsqueeze(0), a.reshape(1)
    if kind == "narrow":
        lo = rng.randrange(a.shape[axis])
        hi = rng.randint(lo + 1, a.shape[axis])
        return t.narrow(axis, lo, hi), np.take(a, range(lo, hi), axis)
    if kind == "permute":
        order = list(range(a.ndim))
        rng.shuffle(order)
        return t.permute(order), a.transpose(order)
    if kind == "unfold" and a.ndim < 5:
        n = rng.choice(divisors(a.shape[axis]))
        m = a.shape[axis] // n
        return t.unfold(axis, n, m), a.reshape(*a.shape[:axis], n, m, *a.shape[axis + 1 :])
    if kind == "fold" and a.ndim > 1 and axis + 1 < a.ndim:
        merged = (*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])
        return t.fold(axis), a.reshape(merged)
    if kind == "concat" and a.size < 5000:
        other = rng.choice([1, 2, 3])
        shape = (*a.shape[:axis], other, *a.shape[axis + 1 :])
        b = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 1 << 15, shape).astype(a.dtype)
        u = tiled(pool, b, rng)
        first = rng.random() < 0.5
        return concat([t, u] if first else [u, t], axis), np.concatenate([a, b] if first else [b, a], axis)
    return step_in_rank(kind, t, a, axis, rng)


def step_in_rank(kind: str, t: Tensor, a: Array, axis: int, rng: random.Random) -> tuple[Tensor, Array]:
    """The methods that add or take away axes, or change nothing."""
    if kind == "expand" and a.ndim < 5 and a.size < 5000:
        n = rng.choice([1, 2, 3])
        return t.unsqueeze(axis).expand(axis, n), np.repeat(np.expand_dims(a, axis), n, axis)
    if kind == "unsqueeze" and a.ndim < 5:
        return t.unsqueeze(axis), np.expand_dims(a, axis)
    if kind == "squeeze" and a.shape[axis] == 1:
        return t.squeeze(axis), a.squeeze(axis)
    if kind == "empty":
        return concat([t.narrow(axis, 0, 0), t], axis), a
    if kind == "split" and a.shape[axis] > 1:
        at = rng.randint(1, a.shape[axis] - 1)
        return concat([t.narrow(axis, 0, at), t.narrow(axis, at, a.shape[axis])], axis), a
    return t, a


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 40))
def test_layout_programs_equal_numpy(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 4)))
    a: Array = np.random.default_rng(seed).integers(0, 1 << 15, shape).astype(np.uint16)
    t = tiled(pool, a, rng)
    for _ in range(rng.randint(1, 30)):
        t, a = step(pool, t, a, rng)
        assert t.shape == a.shape
        check_normal(t)
    assert np.array_equal(t.numpy(), a)


def check_normal(t: Tensor) -> None:
    """The normal form that equality of recipes rests on."""
    if isinstance(t, View):
        assert 0 not in t.shape
        assert all(s == 0 for n, s in zip(t.shape, t.strides, strict=True) if n == 1)
    elif isinstance(t, Concat):
        assert len(t.parts) > 1
        assert not any(isinstance(p, Concat) and p.axis == t.axis for p in t.parts)
        for part in t.parts:
            check_normal(part)
    elif isinstance(t, Fold):
        assert min(t.child.shape[t.axis : t.axis + 2]) > 1
        check_normal(t.child)
    else:
        assert isinstance(t, Fill | Map)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 40))
def test_cutting_and_joining_gives_the_leaf_back(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.randint(1, 3)))
    leaf = pool.store(np.arange(math.prod(shape), dtype=np.uint16).reshape(shape))

    def cut_up(t: Tensor, depth: int) -> Tensor:
        axis = rng.randrange(len(t.shape))
        if depth == 0 or t.shape[axis] < 2:
            return t
        at = rng.randint(1, t.shape[axis] - 1)
        return concat(
            [cut_up(t.narrow(axis, 0, at), depth - 1), cut_up(t.narrow(axis, at, t.shape[axis]), depth - 1)], axis
        )

    assert cut_up(leaf, 3) == leaf


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 40))
def test_assemble_any_tiling_reads_whole(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.choice([1, 2, 5, 7]) for _ in range(rng.randint(1, 3)))
    a = np.random.default_rng(seed).integers(0, 1 << 15, shape).astype(np.uint16)
    assert np.array_equal(tiled(pool, a, rng).numpy(), a)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([((0, 0), (2, 4))], "cover 8 of 16"),
        ([((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap|straight cut|hole"),
        ([((0, 0), (2, 4)), ((3, 0), (2, 4))], "outside"),
        ([((0, 0), (2, 4)), ((0, 0), (2, 4))], "overlap|hole|covers"),
    ],
)
def test_assemble_refuses_what_does_not_tile(
    parts: list[tuple[tuple[int, int], tuple[int, int]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble((4, 4), [(at, Fill(shape, U16)) for at, shape in parts])
