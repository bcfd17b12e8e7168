"""A plan: which files will exist and what every byte of them is, as plain data that prints, pickles and can be cut.

Made without reading a tensor; `execute` is the only thing that acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ckptconv.tensor import Tensor


class Late(NamedTuple):
    """Bytes known but for CRC32s of other segments of the same file: (position in the template, index of that segment)."""

    template: bytes
    crcs: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return len(self.template)


class Segment(NamedTuple):
    """One stretch of a file: header bytes, bytes that carry checksums, or a tensor (row-major) under its stored name."""

    offset: int
    body: Tensor | bytes | Late
    name: str = ""

    @property
    def nbytes(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.nbytes


@dataclass(frozen=True, slots=True)
class File:
    """One output file. Segments tile [0, size) without gap or overlap. A `final` file is small and written after all others."""

    path: str
    size: int
    segments: tuple[Segment, ...]
    final: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """Two tensors that must be equal bit for bit (a replica and the one kept): compared while the plan runs."""

    name: str
    kept: Tensor
    copy: Tensor
    where: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`about` goes into the manifest (versions, options, what was dropped); `root` is what source paths are told relative to.

    `single`: the result is no folder but its only file, at the destination itself; the file's path is then just a title.
    `scratch`: files to remove once the result is there.
    """

    files: tuple[File, ...]
    checks: tuple[Check, ...] = ()
    about: dict[str, object] = field(default_factory=dict)
    root: str = ""
    single: bool = False
    scratch: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(f.size for f in self.files)
