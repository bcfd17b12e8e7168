"""What the hostile tests of torch distributed checkpoints share: a small folder, a pickle that runs things, the refusal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from ckptconv.assemble import Box
from ckptconv.errors import FormatError
from tests.unit.helpers.dcp import handmade

HALVES: list[Box] = [((0, 2), (0, 3)), ((2, 4), (0, 3))]
WEIGHT = torch.arange(12.0).reshape(4, 3)


def made(folder: Path, edit: Callable[[Any], object] = lambda m: None, **options: Any) -> Path:
    """One tensor in two chunks, another whole, and an object; `edit` changes what the metadata says."""
    bias = torch.arange(3)
    return handmade(folder, {"w": (WEIGHT, HALVES), "b": (bias, [((0, 3),)])}, {"o": [None]}, edit=edit, **options)


@contextmanager
def refused(folder: Path, *parts: str, match: str | None = None) -> Iterator[None]:
    """A FormatError that names the folder or a file in it, and each of the parts, in under five seconds."""
    start = time.monotonic()
    with pytest.raises(FormatError, match=match) as caught:
        yield
    assert caught.value.where.startswith(str(folder))
    for part in parts:
        assert part in str(caught.value)
    assert time.monotonic() - start < 5


class Evil:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


W0, W2 = MetadataIndex("w", (0, 0)), MetadataIndex("w", (2, 0))
