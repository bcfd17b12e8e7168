"""Lowering, clipping and reading: any window of any recipe equals numpy's answer."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptconv import moves
from ckptconv.dtypes import BF16, DTYPES, FP16, FP32, UINT8, DType
from ckptconv.errors import FormatError
from ckptconv.leaves import contiguous, full, view
from ckptconv.moves import Reader, Span, clip, make
from ckptconv.nodes import concat
from ckptconv.source import LocalFile, Origin, Source
from ckptconv.tensor import Tensor
from ckptconv.values import Cast, Loss

Array = NDArray[Any]
DATA = np.random.default_rng(0).integers(0, 60000, 1 << 16, dtype=np.uint16)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("moves") / "data"
    file.write_bytes(b"xyz" + DATA.tobytes())  # an odd offset: elements in the file need not be aligned
    return str(file)


def tensor_of(path: str, lo: int, shape: tuple[int, ...]) -> tuple[Tensor, Array]:
    n = int(np.prod(shape))
    source = Source(path, 3, DATA.nbytes).inside(2 * lo, 2 * n)
    return contiguous(source, shape, DTYPES["uint16"]), DATA[lo : lo + n].reshape(shape)


def step(draw: Callable[..., Any], tensor: Tensor, array: Array) -> tuple[Tensor, Array]:
    """One random layout call, on both."""
    axis = draw(st.integers(0, len(tensor.shape) - 1))
    size = tensor.shape[axis]
    match draw(st.sampled_from(["narrow", "permute", "unfold", "fold", "cat", "expand"])):
        case "narrow":
            lo = draw(st.integers(0, size - 1))
            hi = draw(st.integers(lo + 1, size))
            return tensor.narrow(axis, lo, hi), np.take(array, range(lo, hi), axis)
        case "permute":
            order = draw(st.permutations(range(len(tensor.shape))))
            return tensor.permute(order), array.transpose(order)
        case "unfold" if len(tensor.shape) < 5:
            n = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
            shape = (*array.shape[:axis], n, size // n, *array.shape[axis + 1 :])
            return tensor.unfold(axis, n, size // n), array.reshape(shape)
        case "fold" if axis + 1 < len(tensor.shape):
            shape = (*array.shape[:axis], size * array.shape[axis + 1], *array.shape[axis + 2 :])
            return tensor.fold(axis), array.reshape(shape)
        case "cat" if array.size < 3000:
            cut = draw(st.integers(0, size))
            parts = [tensor.narrow(axis, cut, size), tensor.narrow(axis, 0, cut)]
            tail = full((*array.shape[:axis], 2, *array.shape[axis + 1 :]), DTYPES["uint16"], 7)
            swapped = np.concatenate([np.take(array, range(cut, size), axis), np.take(array, range(cut), axis)], axis)
            joined = np.concatenate([swapped, np.full(tail.shape, 7, np.uint16)], axis)
            return concat([*parts, tail], axis), joined
        case "expand" if array.size < 3000 and len(tensor.shape) < 5:
            return tensor.unsqueeze(axis).expand(axis, 3), np.repeat(np.expand_dims(array, axis), 3, axis)
    return tensor, array


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fill_any_window_equals_numpy(path: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    tensor, array = tensor_of(path, data.draw(st.integers(0, 50)), shape)
    for _ in range(data.draw(st.integers(0, 6))):
        tensor, array = step(data.draw, tensor, array)
    assert tensor.shape == array.shape
    fns = data.draw(st.sampled_from([(), (Cast(FP16, FP32),), (Cast(FP16, FP32), Cast(FP32, BF16))]))
    itemsize, lowered = 2, tensor.lower()
    if fns:
        wide: Tensor = tensor
        expected = array.astype(np.uint16).view(np.float16)
        for fn in fns:
            with np.errstate(invalid="ignore"):
                wide, expected = wide.map(fn, fn.target), expected.astype(fn.target.numpy)
        array, itemsize, lowered = expected, fns[-1].target.itemsize, wide.lower()
    whole = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    n = array.size
    lo = data.draw(st.integers(0, n - 1)) * itemsize
    hi = data.draw(st.integers(lo // itemsize + 1, n)) * itemsize
    out = np.full(hi - lo, 0xAA, np.uint8)
    with Reader(data.draw(st.sampled_from([16, 100, 4096]))) as reader:
        reader.fill(pickle.loads(pickle.dumps(lowered)), out, lo)
    np.testing.assert_array_equal(out, whole[lo:hi])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_clip_covers_the_window_once(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    out_strides, n = [], 2
    for size in reversed(shape):
        out_strides.append(n)
        n *= size + data.draw(st.integers(0, 1))  # gaps: another tensor's rows between ours
    order = data.draw(st.permutations(range(len(shape))))
    strides, m = [0] * len(shape), 2
    for axis in order:
        strides[axis], m = m, m * shape[axis]
    move = make(Source("f", 0, m), 0, shape, tuple(strides), 10, tuple(reversed(out_strides)), 2, 2, ())
    lo = 2 * data.draw(st.integers(0, n // 2 + 6))
    hi = lo + 2 * data.draw(st.integers(0, n // 2 + 6))
    inside = [e for e in elements(move) if lo <= e[1] < hi]
    assert sorted(e for part in clip(move, lo, hi) for e in elements(part)) == sorted(inside)
    assert len(clip(move, lo, hi)) <= 2 * len(shape)


def test_clip_covers_every_window_of_a_box_once() -> None:
    move = make(Source("f", 0, 1000), 0, (3, 4, 2), (2, 6, 24), 10, (20, 4, 2), 2, 2, ())  # with gaps between its rows
    for lo in range(0, 80, 2):
        for hi in range(lo, 80, 2):
            inside = sorted(e for e in elements(move) if lo <= e[1] < hi)
            assert sorted(e for part in clip(move, lo, hi) for e in elements(part)) == inside, (lo, hi)


def elements(move: moves.Move) -> list[tuple[int, int]]:
    """(source byte, destination byte) of every element."""
    pairs = [
        (
            move.offset + sum(i * s for i, s in zip(index, move.strides, strict=True)),
            move.out + sum(i * s for i, s in zip(index, move.out_strides, strict=True)),
        )
        for index in np.ndindex(*move.shape)
    ]
    return [(a + k, b + k) for a, b in pairs for k in range(move.item)]


def test_make_contiguous_on_both_sides_is_one_run() -> None:
    move = make(Source("f", 0, 240), 0, (3, 4, 5), (80, 20, 4), 0, (80, 20, 4), 4, 4, ())
    assert (move.shape, move.strides, move.item) == ((240,), (1,), 1)


def test_fill_thin_columns_are_read_run_by_run(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "SEEK", 8)
    tensor, array = tensor_of(path, 0, (256, 128))
    column = tensor.unfold(1, 8, 16).narrow(1, 2, 3).permute((2, 1, 0))
    expected = array.reshape(256, 8, 16)[:, 2:3].transpose(2, 1, 0)
    for scratch in (64, 1000, 1 << 20):
        read: list[int] = []
        with Reader(scratch, counting(read)) as reader:
            out = np.zeros(column.nbytes, np.uint8)
            reader.fill(column.lower(), out, 0)
        np.testing.assert_array_equal(out.view(np.uint16), np.ascontiguousarray(expected).reshape(-1))
        assert sum(read) == column.nbytes


def test_fill_siblings_share_a_window(path: str) -> None:
    tensor, array = tensor_of(path, 0, (64, 64))
    read: list[int] = []
    with Reader(1 << 20, counting(read)) as reader:
        for rank in range(4):
            part = tensor.narrow(1, 16 * rank, 16 * rank + 16)
            out = np.zeros(part.nbytes, np.uint8)
            reader.fill(part.lower(), out, 0, Span(Origin(path), 3, 3 + 64 * 64 * 2))
            np.testing.assert_array_equal(out.view(np.uint16).reshape(64, 16), array[:, 16 * rank : 16 * rank + 16])
    assert read == [64 * 64 * 2]


def test_fill_short_reads_are_continued(path: str) -> None:
    tensor, array = tensor_of(path, 0, (100, 300))
    with Reader(1 << 20, lambda p: Dribble(p, 777)) as reader:
        out = np.zeros(tensor.nbytes, np.uint8)
        reader.fill(tensor.narrow(1, 0, 150).lower(), out[: 100 * 150 * 2], 0)
        np.testing.assert_array_equal(out[:30000].view(np.uint16).reshape(100, 150), array[:, :150])
        reader.fill(tensor.lower(), out, 0)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(array.shape), array)


def test_fill_past_the_end_names_file_and_byte(tmp_path: Path) -> None:
    short = tmp_path / "short.bin"
    short.write_bytes(bytes(100))
    tensor = contiguous(Source(str(short), 0, 400), (100,), FP32)
    with pytest.raises(FormatError, match=r"short\.bin: nothing at byte 100, 300 more"):
        tensor.numpy()


def test_fill_unreadable_source_names_the_file(tmp_path: Path) -> None:
    tensor = contiguous(Source(str(tmp_path / "gone.bin"), 0, 400), (100,), FP32)
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        tensor.numpy()


def test_reader_keeps_few_sources_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "OPEN_SOURCES", 3)
    before = len(os.listdir("/proc/self/fd"))
    parts = []
    for i in range(10):
        (tmp_path / f"{i}").write_bytes(bytes([i] * 4))
        parts.append(contiguous(Source(str(tmp_path / f"{i}"), 0, 4), (4,), DTYPES["uint8"]))
    out = np.zeros(40, np.uint8)
    with Reader() as reader:
        reader.fill(concat(parts, 0).lower(), out, 0)
        assert len(os.listdir("/proc/self/fd")) == before + 3
    assert len(os.listdir("/proc/self/fd")) == before
    np.testing.assert_array_equal(out, np.repeat(np.arange(10, dtype=np.uint8), 4))


def test_fill_more_runs_than_one_read_takes(path: str) -> None:
    """The system refuses more than 1024 buffers."""
    source = Source(path, 3, DATA.nbytes)
    windows = [contiguous(source.inside(16 * i, 4), (2,), DTYPES["uint16"]) for i in range(3000)]
    np.testing.assert_array_equal(concat(windows, 0).numpy(), DATA[:24000].reshape(3000, 8)[:, :2].reshape(-1))


def test_fill_after_a_read_that_failed_half_way(tmp_path: Path) -> None:
    """What is left of it in the buffer is not taken for what was there before."""
    array = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for name, data in (("whole", array), ("cut", array[:4] + 100)):
        (tmp_path / name).write_bytes(data.tobytes())
    whole, cut = (
        contiguous(Source(str(tmp_path / n), 0, 128), (8, 8), DTYPES["uint16"]).permute((1, 0))
        for n in ("whole", "cut")
    )
    out = np.zeros(128, np.uint8)
    with Reader() as reader:
        reader.fill(whole.lower(), out, 0)
        with pytest.raises(FormatError, match="truncated"):
            reader.fill(cut.lower(), out, 0)
        reader.fill(whole.lower(), out, 0)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), array.T)


def test_fill_constants_through_functions_counts_each_copy() -> None:
    tensor = full((3, 4), FP32, 1e30).map(Cast(FP32, FP16), FP16)
    out = np.zeros(tensor.nbytes, np.uint8)
    with Reader() as reader:
        assert reader.fill(tensor.lower(), out, 0) == Loss(12, 0)
    assert np.isinf(out.view(np.float16)).all()


@pytest.mark.parametrize(
    ("source", "target", "values", "loss"),
    [
        (FP32, FP16, [1.0, 1e6, -1e6, np.inf, np.nan, 1e-10, 0.0, -0.0], Loss(2, 1)),
        (FP32, BF16, [3.4e38, 1.0, np.inf, 1e-42, 0.0], Loss(1, 1)),
        (BF16, FP16, [1e30, 1.0, 1e-30, -1e-30], Loss(1, 2)),
        (FP32, DTYPES["fp8_e4m3"], [1e6, 1.0, 1e-9, np.nan], Loss(1, 1)),
        (FP16, FP32, [6e4, 1e-7, np.inf], Loss()),
        (FP16, BF16, [6e4, 6e-8, np.inf], Loss()),
        (BF16, FP32, [1e38, -0.0, np.inf, 1e-40], Loss()),
    ],
)
def test_cast_counts_what_it_loses(source: DType, target: DType, values: list[float], loss: Loss) -> None:
    with np.errstate(all="ignore"):
        src = np.array(values, np.float64).astype(source.numpy)
        expected = src.astype(target.numpy)
    dst = np.empty(len(values), target.numpy)
    assert (Cast(source, target)(src, dst) or Loss()) == loss
    np.testing.assert_array_equal(dst.view(np.uint8), expected.view(np.uint8))


def test_cast_of_integers_is_refused() -> None:
    with pytest.raises(ValueError, match="only floating-point"):
        Cast(DTYPES["int32"], FP32)


def test_view_with_stride_zero_repeats(path: str) -> None:
    row = view(Source(path, 3, 20), 0, (1, 10), (0, 2), DTYPES["uint16"]).expand(0, 5)
    np.testing.assert_array_equal(row.numpy(), np.repeat(DATA[None, :10], 5, 0))


class Dribble(LocalFile):
    """A source that gives at most `most` bytes at once."""

    def __init__(self, path: str, most: int) -> None:
        super().__init__(path)
        self.most = most

    def read_into(self, offset: int, buffers: list[memoryview]) -> int:
        return super().read_into(offset, [buffers[0][: self.most]])


def counting(read: list[int]) -> Any:
    class Counting(LocalFile):
        def read_into(self, offset: int, buffers: list[memoryview]) -> int:
            n = super().read_into(offset, buffers)
            read.append(n)
            return n

    return Counting


@pytest.mark.parametrize("advice", ["refused", "not known"])
def test_a_source_is_read_where_the_system_takes_no_advice(
    advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: int) -> None:
        raise OSError(errno.EINVAL, "no advice here")

    if advice == "refused":
        monkeypatch.setattr(os, "posix_fadvise", refused)
    else:
        monkeypatch.delattr(os, "posix_fadvise")
    (tmp_path / "x").write_bytes(bytes(range(8)))
    assert contiguous(Source(str(tmp_path / "x"), 2, 4), (4,), UINT8).numpy().tolist() == [2, 3, 4, 5]


def test_neighbouring_bytes_of_two_files_are_two_reads(tmp_path: Path) -> None:
    """A tensor of which one half ends in a file where the other half begins in another."""
    for name, byte in (("a", 1), ("b", 2)):
        (tmp_path / name).write_bytes(bytes([byte]) * 64)
    halves = [contiguous(Source(str(tmp_path / name), at, 32), (32,), UINT8) for name, at in (("a", 0), ("b", 32))]
    assert concat(halves, 0).numpy().tolist() == [1] * 32 + [2] * 32
