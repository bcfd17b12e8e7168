"""For container tests: a plain writer of planned files, independent of the executor; comparison with torch."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import random
import struct
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptconv.containers.pickled import Namespace, Opaque, TorchDType, bytes_of, to_numpy
from ckptconv.errors import FormatError
from ckptconv.plan import File, Late
from ckptconv.tensor import Tensor


def write(file: File, folder: Path) -> Path:
    """Write the file, tensors first; checks that segments tile it."""
    bodies, at = {}, 0
    for i, segment in enumerate(file.segments):
        assert segment.offset == at, (i, segment.offset, at)
        at += segment.nbytes
        if isinstance(segment.body, Tensor):
            bodies[i] = segment.body.numpy().tobytes()
        elif isinstance(segment.body, bytes):
            bodies[i] = segment.body
    assert at == file.size
    for i, segment in enumerate(file.segments):
        if isinstance(segment.body, Late):
            out = bytearray(segment.body.template)
            for position, other in segment.body.crcs:
                struct.pack_into("<I", out, position, zlib.crc32(bodies[other]))
            bodies[i] = bytes(out)
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(bodies[i] for i in range(len(file.segments))))
    return path


class Stub:
    """Stands for a Megatron class when torch loads a golden: importing the real ones takes seconds and warns."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __hash__(self) -> int:
        return hash(self.args)


class _StubUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (Stub,), {}) if module.startswith("megatron") else super().find_class(module, name)


STUB_PICKLE = types.SimpleNamespace(__name__="stub", Unpickler=_StubUnpickler, load=pickle.load)


def torch_load(path: Path, **options: Any) -> Any:
    """torch.load of one of our own goldens."""
    return torch.load(path, weights_only=False, pickle_module=STUB_PICKLE, **options)


def stored_zip(records: dict[str, bytes], path: Path) -> Path:
    """A zip of stored records as zipfile writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def torch_zip(pickled: bytes, path: Path, **records: bytes) -> Path:
    """A torch file around any pickle; `data_0=…` is the record data/0."""
    named = {f"x/{name.replace('_', '/')}": content for name, content in records.items()}
    return stored_zip({"x/data.pkl": pickled, **named, "x/byteorder": b"little", "x/version": b"3\n"}, path)


@contextlib.contextmanager
def refused(path: Path, member: str = "", match: str | None = None) -> Iterator[None]:
    """The block raises a FormatError that names the file (and the member), in under five seconds."""
    start = time.monotonic()
    with pytest.raises(FormatError, match=match) as caught:
        yield
    assert caught.value.where.partition("!")[0] == str(path)
    assert member in caught.value.where
    assert time.monotonic() - start < 5


def attempt(path: Path, read: Callable[[Path], object]) -> object:
    """What the file reads as, or None where it is refused by name; any other error comes through."""
    where = str(path)
    try:
        return read(path)
    except FormatError as error:
        where = error.where
    assert where.partition("!")[0] == str(path)
    return None


def flatten(value: object) -> str:
    """All that a reading means, tensors with their bits, as a text to compare."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{value.shape}{value.numpy().tobytes().hex()}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {flatten(v)}' for k, v in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(flatten, value))})"
    return flatten(value.__dict__) if isinstance(value, Namespace) else repr(value)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(ours: object, theirs: object, path: str = "") -> None:
    """What we read is what torch loaded: values and, for tensors, shape, dtype and bits."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, Tensor), path
        assert ours.shape == tuple(theirs.shape), path
        assert ours.dtype.torch == str(theirs.dtype).removeprefix("torch."), path
        assert ours.numpy().tobytes() == bits(theirs), path
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict), path
        assert len(ours) == len(theirs), path
        for (a, x), (b, y) in zip(ours.items(), theirs.items(), strict=True):
            assert_same(a, b, f"{path}/{b}")
            assert_same(x, y, f"{path}/{b}")
    elif isinstance(theirs, (list, tuple)) and not isinstance(theirs, torch.Size):
        assert type(ours) is type(theirs), path
        assert len(ours) == len(theirs), path
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(theirs, argparse.Namespace):
        assert isinstance(ours, Namespace), path
        assert_same(ours.__dict__, vars(theirs), path)
    elif isinstance(theirs, torch.dtype):
        assert ours == TorchDType(str(theirs).removeprefix("torch.")), path
    elif isinstance(theirs, np.ndarray):
        array = to_numpy(ours)
        assert array is not None, path
        assert array.dtype == theirs.dtype, path
        assert np.array_equal(array, theirs), path
    elif isinstance(theirs, (type(None), bool, int, float, str, bytes, set, frozenset)):
        assert type(ours) is type(theirs), path
        assert ours == theirs or ours != ours, path
    else:
        assert isinstance(ours, Opaque), path
        assert ours.name == type(theirs).__name__, (path, ours, theirs)
        if isinstance(theirs, Stub):
            assert ours.args == theirs.args, path
        if isinstance(theirs, io.BytesIO):
            assert bytes_of(ours) == theirs.getvalue(), path


def scarred(data: bytes, n: int, rng: random.Random) -> bytearray:
    """`n` bytes somewhere replaced, taken out, put in, or set to zero."""
    out, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            out[at : at + n] = rng.randbytes(n)
        case 1:
            del out[at : at + n]
        case 2:
            out[at:at] = rng.randbytes(n)
        case _:
            out[at : at + n] = bytes(n)
    return out
