"""The ops a mapping file may use: how a stored tensor is put together from others, and taken apart again.

Each op knows shapes only; names, ranks and dtypes live elsewhere. `inverse(forward(xs), shapes)` gives back xs, leaf for leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckptconv import nodes
from ckptconv.tensor import Shape, Tensor


class Op(Protocol):
    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the result. ValueError when the operands do not fit."""
        ...

    def forward(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def inverse(self, whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """The operands, given their shapes."""
        ...


@dataclass(frozen=True, slots=True)
class Concat:
    """Join along `axis`; with groups, every operand is split in that many and they are joined group by group."""

    axis: int = 0
    groups: int = 1

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        a, first = self.axis, shapes[0]
        if any((*s[:a], *s[a + 1 :]) != (*first[:a], *first[a + 1 :]) for s in shapes):
            raise ValueError(f"concat of unlike shapes {list(shapes)}")
        if any(s[a] % self.groups for s in shapes):
            raise ValueError(f"shapes {list(shapes)} do not split into {self.groups} groups along axis {a}")
        return (*first[:a], sum(s[a] for s in shapes), *first[a + 1 :])

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        a, g = self.axis, self.groups
        if g == 1:
            return nodes.concat(tensors, a)
        return nodes.concat([t.unfold(a, g, t.shape[a] // g) for t in tensors], a + 1).fold(a)

    def inverse(self, whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        a, g = self.axis, self.groups
        grouped = whole.unfold(a, g, whole.shape[a] // g) if g > 1 else whole
        out, at = [], 0
        for shape in shapes:
            n = shape[a] // g
            piece = grouped.narrow(a + (g > 1), at, at + n)
            out.append(piece.fold(a) if g > 1 else piece)
            at += n
        return out


@dataclass(frozen=True, slots=True)
class Stack:
    """Operands of one shape on a new axis."""

    axis: int = 0

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        if len(set(shapes)) != 1:
            raise ValueError(f"stack of unlike shapes {sorted(set(shapes))}")
        return (*shapes[0][: self.axis], len(shapes), *shapes[0][self.axis :])

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return nodes.concat([t.unsqueeze(self.axis) for t in tensors], self.axis)

    def inverse(self, whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return _members(whole, self.axis)


def _members(whole: Tensor, axis: int) -> list[Tensor]:
    """Every entry along an axis. Parts are walked once: narrowing to each entry in turn would look for it among all of them."""
    if isinstance(whole, nodes.Concat) and whole.axis == axis:
        return [member for part in whole.parts for member in _members(part, axis)]
    return [whole.narrow(axis, i, i + 1).squeeze(axis) for i in range(whole.shape[axis])]


@dataclass(frozen=True, slots=True)
class Permute:
    """Axes in another order."""

    order: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if len(shape) != len(self.order):
            raise ValueError(f"permute {self.order} of shape {shape}")
        return tuple(shape[i] for i in self.order)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].permute(self.order)

    def inverse(self, whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [whole.permute([self.order.index(i) for i in range(len(self.order))])]


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same row-major elements in another shape; one entry of `to` may be -1."""

    to: tuple[int, ...]

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        size, known = math.prod(shape), math.prod(n for n in self.to if n != -1)
        result = tuple(size // known if n == -1 else n for n in self.to)
        if math.prod(result) != size:
            raise ValueError(f"shape {shape} cannot be reshaped to {self.to}")
        return result

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return _reshape(tensors[0], self.shape([tensors[0].shape]))

    def inverse(self, whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [_reshape(whole, shapes[0])]


def _reshape(tensor: Tensor, to: Shape) -> Tensor:
    while len(tensor.shape) > 1:
        tensor = tensor.fold(len(tensor.shape) - 2)
    for i, n in enumerate(to[:-1]):
        tensor = tensor.unfold(i, n, tensor.shape[i] // n)
    return tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Rows of every head from half-split rotary order (Hugging Face) to interleaved pairs (Meta)."""

    heads: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        if shape[0] % (2 * self.heads):
            raise ValueError(f"{shape[0]} rows are not {self.heads} heads of an even size")
        return shape

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._regroup(tensors[0], halves_first=True)

    def inverse(self, whole: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [self._regroup(whole, halves_first=False)]

    def _regroup(self, tensor: Tensor, *, halves_first: bool) -> Tensor:
        half = tensor.shape[0] // self.heads // 2
        split = tensor.unfold(0, self.heads, 2 * half).unfold(1, *((2, half) if halves_first else (half, 2)))
        return split.permute([0, 2, 1, *range(3, len(split.shape))]).fold(1).fold(0)


OPS: dict[str, Callable[..., Op]] = {
    "concat": Concat,
    "stack": Stack,
    "permute": Permute,
    "reshape": Reshape,
    "rope": Rope,
}
