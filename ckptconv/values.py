"""Value functions: what may happen to the numbers themselves. Each is plain data and acts element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ckptconv.dtypes import DType

Array = NDArray[Any]
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Loss(NamedTuple):
    """How many finite values a narrowing cast turned into something else."""

    to_inf: int = 0
    to_zero: int = 0

    def plus(self, other: Loss, times: int = 1) -> Loss:
        return Loss(self.to_inf + times * other.to_inf, self.to_zero + times * other.to_zero)


NO_LOSS = Loss()


class ValueFn(Protocol):
    """An elementwise function as data: a frozen dataclass, compared by value and picklable; it writes into `dst`."""

    @property
    def source(self) -> DType: ...

    @property
    def target(self) -> DType: ...

    def __call__(self, src: Array, dst: Array) -> Loss | None: ...


@dataclass(frozen=True, slots=True)
class Cast:
    """Round to the nearest value of another float type; counts what a type of smaller range makes of finite values."""

    source: DType
    target: DType

    def __post_init__(self) -> None:
        if not (self.source.is_float and self.target.is_float):
            raise ValueError(f"cast from {self.source} to {self.target}: only floating-point types are cast")

    @property
    def narrows(self) -> bool:
        """Whether some finite value may become infinite (or NaN, where the type has no infinity) or zero."""
        (a_max, a_min), (b_max, b_min) = _range(self.source), _range(self.target)
        return b_max < a_max or b_min > a_min

    def __call__(self, src: Array, dst: Array) -> Loss | None:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(dst, src, casting="unsafe")
        if not self.narrows:
            return None
        infinite, zeros = _lost(dst, self.target)
        if infinite or zeros:  # rare: then those that were so before do not count
            already = _lost(src, self.source)
            infinite, zeros = infinite - already[0], zeros - already[1]
        return Loss(infinite, zeros)


class Chain:
    """Applies functions one after the other; values in between live in two buffers, taken in turn and used again."""

    def __init__(self) -> None:
        self._spares = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def __call__(self, fns: tuple[ValueFn, ...], src: Array, dst: Array) -> Loss:
        loss = NO_LOSS
        for i, fn in enumerate(fns[:-1]):
            need = src.size * fn.target.itemsize
            if need > len(self._spares[i % 2]):
                self._spares[i % 2] = np.empty(need, np.uint8)
            between = self._spares[i % 2][:need].view(fn.target.numpy).reshape(src.shape)
            loss = loss.plus(fn(src, between) or NO_LOSS)
            src = between
        return loss.plus(fns[-1](src, dst) or NO_LOSS)


def constant(bits: int, fns: tuple[ValueFn, ...]) -> tuple[Array, Loss]:
    """What the functions make of one constant, and what each copy of it loses."""
    value: Array = np.array([bits], UINT[fns[0].source.itemsize]).view(fns[0].source.numpy)
    into: Array = np.empty(1, fns[-1].target.numpy)
    return into, Chain()(fns, value, into)


def _range(dtype: DType) -> tuple[float, float]:
    """The largest finite value and the smallest above zero."""
    info: Any = ml_dtypes.finfo(dtype.numpy)  # type: ignore[no-untyped-call]
    return float(info.max), float(info.smallest_subnormal)


def _lost(values: Array, dtype: DType) -> tuple[int, int]:
    """How many are not finite, and how many zero, told from the bits: without the sign they order as magnitudes do."""
    uint = UINT[dtype.itemsize]
    magnitude = np.left_shift(values.view(uint), 1)
    largest = np.array([_range(dtype)[0]], dtype.numpy).view(uint)[0] << 1
    infinite = np.count_nonzero(magnitude > largest) if magnitude.max(initial=0) > largest else 0
    zeros = values.size - np.count_nonzero(magnitude) if magnitude.min(initial=1) == 0 else 0
    return int(infinite), int(zeros)
