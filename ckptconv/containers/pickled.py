"""What a pickle says, as inert values: names and arguments that print, compare and can be pickled back, and never run.

Plain Python containers, numbers, strings and bytes stand for themselves, tensors are lazy; these are the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from reprlib import repr as short_repr
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ckptconv.dtypes import BY_TORCH, DType
from ckptconv.source import Source

K = TypeVar("K")
V = TypeVar("V")

MAX_DEPTH = 100  # nesting: far more than any checkpoint has, far less than Python's recursion limit
MAX_EXPANDED = 10_000_000  # values, counting a shared one each time it is met: what a walk over the object costs

# Sub-byte, complex and unsigned-zero types too: as values they are only names.
TORCH_DTYPES = frozenset(BY_TORCH) | frozenset(
    "complex32 complex64 complex128 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 qint8 "
    "quint8 qint32 quint4x2 quint2x4 bits8 bits16 bits1x8 bits2x4 bits4x2".split()
)


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function by name. Nothing stands behind it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class TorchDType:
    """A torch dtype as a value, such as `args.params_dtype`."""

    name: str

    @property
    def dtype(self) -> DType | None:
        """Ours of the same name, if there is one."""
        return BY_TORCH.get(self.name)

    def __str__(self) -> str:
        return f"torch.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """A bare torch storage (one that no tensor is wrapped around): `dtype` is None for an untyped one."""

    source: Source
    dtype: DType | None


class Ordered(dict[K, V]):
    """An OrderedDict: a dict that is written back as one, with the attributes torch hangs on it (`_metadata`)."""

    attributes: dict[str, object] | None = None


class Namespace:
    """An argparse.Namespace: values by attribute. A pickled state goes into `__dict__`, never through setattr."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, Namespace) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"these args have no {name!r}")

    def __repr__(self) -> str:
        return f"Namespace({', '.join(f'{k}={short_repr(v)}' for k, v in self.__dict__.items())})"


@dataclass(slots=True)
class Opaque:
    """An object of an unknown class: `module.name(*args)`, then `state`, `items` (of a list) and `pairs` (of a dict).

    `new`: the class's __new__ was meant and not a call, which matters only when it is pickled back. `sealed`: it is
    the key of a dict and may no longer change.
    """

    module: str
    name: str
    args: tuple[object, ...] = ()
    state: object = None
    items: list[object] = field(default_factory=list)
    pairs: list[tuple[object, object]] = field(default_factory=list)
    new: bool = False
    sealed: bool = field(default=False, compare=False)

    def __hash__(self) -> int:
        return hash((self.module, self.name, self.args))  # an enum member may be the key of a dict

    def __repr__(self) -> str:
        more = f" with state {short_repr(self.state)}" if self.state is not None else ""
        more += "".join(f" with {what}" for what, there in (("items", self.items), ("pairs", self.pairs)) if there)
        return f"<{self.module}.{self.name}({', '.join(map(short_repr, self.args))}){more}>"


class Known:
    """An object of a class that the caller knows, with its state as pickled.

    It is told apart by identity, so it may be the key of a dict whatever its state. The limits on a finished object stop
    before it: whoever knows the class looks at its state, one level at a time.
    """

    __slots__ = ("cls", "state")

    def __init__(self, cls: Global, state: object = None) -> None:
        self.cls, self.state = cls, state

    def __repr__(self) -> str:
        return f"<{self.cls}>"


def bytes_io(data: bytes) -> Opaque:
    """An io.BytesIO at its end, as torch.save leaves it (TransformerEngine's `_extra_state`)."""
    return Opaque("_io", "BytesIO", state=(data, len(data), None), new=True)


def bytes_of(value: object) -> bytes | None:
    """The content of a BytesIO, or None if that is not what the value is."""
    if isinstance(value, Opaque) and (value.module, value.name) in (("_io", "BytesIO"), ("io", "BytesIO")):
        match value.state:
            case (bytes() as data, *_):
                return data
    return None


def to_numpy(value: object) -> NDArray[np.generic] | None:
    """A pickled numpy array of plain numbers as an array (RNG states), or None if that is not what the value is."""
    match value:
        case Opaque(
            name="_reconstruct",
            state=(int(), tuple() as shape, Opaque(name="dtype") as kind, bool() as fortran, bytes() as data),
        ):
            order: Literal["C", "F"] = "F" if fortran else "C"
        case Opaque(
            name="_frombuffer",
            args=(bytes() | bytearray() as data, Opaque(name="dtype") as kind, tuple() as shape, "C" | "F" as order),
        ):
            pass
        case _:
            return None
    dtype = _plain_dtype(kind)
    if dtype is None or not all(type(n) is int and n >= 0 for n in shape):
        return None
    try:
        return np.frombuffer(data, dtype).reshape(shape, order=order)
    except ValueError:
        return None


def _plain_dtype(kind: Opaque) -> np.dtype[np.generic] | None:
    code = kind.args[0] if kind.args else None
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "|"
    if (
        not isinstance(code, str)
        or not re.fullmatch(r"b1|[iu][1248]|f[248]", code)
        or order not in ("<", ">", "|", "=")
    ):
        return None
    return np.dtype(code if order == "|" else order + code)


MAX_KEY = 16  # values in a tuple that is the key of a dict
_SCALARS = frozenset((str, float, bool, bytes, type(None), TorchDType, Global))


def key(value: object, depth: int = 2) -> object:
    """The value, if it may be the key of a dict: hashed at bounded cost, and not crafted to collide."""
    kind = type(value)
    if kind in _SCALARS or kind is Known or (kind is int and -(1 << 63) <= value < 1 << 64):  # type: ignore[operator]
        return value
    inner = value.args if isinstance(value, Opaque) and _seal(value) else value
    if depth and isinstance(inner, (tuple, frozenset)) and len(inner) <= MAX_KEY:
        for item in inner:
            key(item, depth - 1)
        return value
    raise ValueError(f"a {kind.__name__} cannot be the key of a dict")


def _seal(value: Opaque) -> bool:
    """Whether only name and arguments make the value; it is then kept so, for dicts compare their keys."""
    value.sealed = value.state is None and not value.items and not value.pairs
    return value.sealed


# -- which names are refused ------------------------------------------------------------------------------------------

# Reading calls nothing, so these are harmless to us. They are refused because a checkpoint that holds one is an attack
# on whoever opens it with torch or pickle, and its owner should hear of it. The list cannot be complete, nor need be.
_CODE_MODULES = frozenset(
    "os posix nt sys subprocess shutil socket pty commands runpy importlib imp code codeop ctypes _ctypes "
    "cffi webbrowser multiprocessing threading asyncio pickle _pickle cPickle marshal operator _operator "
    "timeit pdb bdb trace profile cProfile tempfile platform inspect pydoc pip ensurepip site sysconfig venv "
    "requests urllib urllib2 http ftplib smtplib xmlrpc socketserver shelve dill cloudpickle joblib atexit gc "
    "linecache builtins __builtin__ eval exec compile __import__ getattr setattr system popen".split()
)
_BUILTINS = frozenset(
    "set frozenset complex bytearray bytes str int float bool list dict tuple slice range xrange object long "
    "unicode getattr Ellipsis NotImplemented".split()  # getattr is how some Python versions pickle an enum member
)
_CODE_NAMES = frozenset(
    "torch.load torch.hub.load torch.ops.load_library torch.utils.cpp_extension.load torch.jit.load "
    "numpy.load torch._inductor.codecache.compile_file torch.serialization.load numpy.fromfile numpy.memmap "
    "io.open _io.open _io.FileIO _io.open_code io.open_code io.FileIO numpy.testing._private.utils.runstring "
    "types.CodeType types.FunctionType".split()
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.ASCII)


def refusal(module: str, name: str) -> str | None:
    """Why a pickle that names this global is refused, or None."""
    if not _IDENTIFIER.fullmatch(module) or not _IDENTIFIER.fullmatch(name):
        return f"names {module[:80]!r} {name[:80]!r}, which is not a Python name"
    root = module.partition(".")[0]
    if root in ("builtins", "__builtin__") and name in _BUILTINS:
        return None
    parts = name.split(".")
    dotted = len(parts) > 1 and not _CODE_MODULES.isdisjoint(parts)
    if root in _CODE_MODULES or dotted or f"{module}.{name}" in _CODE_NAMES:
        return f"would run {module}.{name} in a program that unpickles it; nothing was run here. Do not trust this file"
    return None


# What came out of a file is only written into another if it is one of these: a converter must not pass an attack on.
_WRITABLE_MODULES = (
    "argparse", "collections", "_codecs", "datetime", "signal", "pathlib", "numpy.dtypes", "torch._utils",
    "torch.storage", "megatron.core.enums", "megatron.core.transformer.enums", "megatron.core.rerun_state_machine",
    "megatron.core.optimizer.optimizer_config", "transformer_engine.common.recipe",
)  # fmt: skip
_WRITABLE = frozenset(
    "types.SimpleNamespace _io.BytesIO io.BytesIO torch.Size torch.device torch.Tensor "
    "torch.nn.parameter.Parameter torch._tensor._rebuild_from_type_v2 torch._C.Generator "
    "megatron.core.optimizer.OptimizerConfig numpy.dtype numpy.ndarray numpy._core.multiarray._reconstruct "
    "numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar "
    "numpy._core.numeric._frombuffer numpy.core.multiarray.scalar".split()
)


def may_write(module: str, name: str, allowed: Collection[str]) -> bool:
    """Whether a global that came from a file may be written into another; the caller may allow more, by full name."""
    full = f"{module}.{name}"
    if refusal(module, name) is not None:
        return False
    if module in ("builtins", "__builtin__"):
        return name != "getattr"
    storage = module == "torch" and name.endswith("Storage")
    return module in _WRITABLE_MODULES or full in _WRITABLE or full in allowed or storage
