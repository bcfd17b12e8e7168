"""How torch pickles tensors: storages by persistent id, and the rebuild functions that turn them into lazy tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from reprlib import repr as short_repr
from typing import NamedTuple

from ckptconv.containers.pickled import Global, Opaque, Storage, TorchDType
from ckptconv.containers.plain_calls import Args, Call
from ckptconv.containers.unpickle import Unpickler
from ckptconv.dtypes import BY_STORAGE, DType
from ckptconv.leaves import view
from ckptconv.source import Source
from ckptconv.tensor import Tensor

MAX_AXES = 64
MAX_NBYTES = 1 << 62
UNTYPED = Global("torch.storage", "UntypedStorage")


class StorageId(NamedTuple):
    """A persistent id, parsed: ('storage', class, key, device, number of elements), and a window of it in old files."""

    key: str
    dtype: DType | None  # None: untyped, counted in bytes
    numel: int
    window: tuple[int, int] | None

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if self.dtype else 1

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def storage_id(pid: object) -> StorageId:
    """Parse a persistent id; anything that is not a storage's is an error."""
    match pid:
        case ("storage", Global() as kind, str() as key, str(), int() as numel, *more) if len(more) <= 1 and numel >= 0:
            pass
        case _:
            raise ValueError(f"has a persistent id that is not a storage's: {short_repr(pid)}")
    dtype = BY_STORAGE.get(kind.name) if kind.module in ("torch", "torch.cuda") else None
    if dtype is None and kind != UNTYPED:
        raise ValueError(f"storage {key[:80]!r} is a {kind}, a type that is not supported")
    return StorageId(key, dtype, numel, _window(more[0], numel) if more and more[0] is not None else None)


def _window(told: object, numel: int) -> tuple[int, int]:
    """Files of before torch 1.0 may keep a storage as a window, in elements, of another."""
    match told:
        case (str(), int() as offset, int() as size) if 0 <= offset <= offset + size <= numel:
            return offset, size
    raise ValueError(f"has a storage window {short_repr(told)} that is not inside its storage")


class Storages:
    """The persistent ids of a pickle, each resolved once by `find` to the byte range it stands for."""

    def __init__(self, find: Callable[[StorageId], Source]) -> None:
        self._find = find
        self._known: dict[str, tuple[StorageId, Source]] = {}

    @property
    def keys(self) -> set[str]:
        return set(self._known)

    def __call__(self, pid: object) -> Storage:
        told = storage_id(pid)
        known = self._known.get(told.key)
        if known is None:
            known = self._known[told.key] = (told, self._find(told))
        elif known[0].nbytes != told.nbytes:
            raise ValueError(
                f"storage {told.key[:80]!r} has {known[0].nbytes} bytes in one place and {told.nbytes} in another"
            )
        source = known[1]
        if told.window:
            source = source.inside(told.window[0] * told.itemsize, told.window[1] * told.itemsize)
        return Storage(source, told.dtype)


def strided(storage: object, offset: object, shape: object, strides: object, dtype: DType | None) -> Tensor:
    """A window on a storage, its farthest element checked to lie inside; offset and strides count elements."""
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError(f"a tensor has no storage of a known type, but {short_repr(storage)}")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or not len(shape) == len(strides) <= MAX_AXES:
        raise ValueError(f"a tensor has shape {short_repr(shape)} and strides {short_repr(strides)}")
    if type(offset) is not int or not 0 <= offset <= MAX_NBYTES:
        raise ValueError(f"a tensor begins at {short_repr(offset)}")
    item, farthest, numel, steps = dtype.itemsize, offset, 1, []
    for n, stride in zip(shape, strides, strict=True):
        if type(n) is not int or type(stride) is not int or not (0 <= n <= MAX_NBYTES and 0 <= stride <= MAX_NBYTES):
            raise ValueError(f"a tensor has shape {short_repr(shape)} and strides {short_repr(strides)}")
        farthest += (n - 1) * stride
        numel *= n
        steps.append(stride * item)
    if numel * item > MAX_NBYTES:
        raise ValueError(f"a tensor of shape {shape} overflows")
    if numel and (farthest + 1) * item > storage.source.nbytes:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} at {offset} reaches element {farthest} "
            f"of a storage of {storage.source.nbytes // item}"
        )
    return view(storage.source, offset * item, shape, steps, dtype)


def _rebuild_tensor(u: Unpickler, args: Args) -> object:
    """v1 and v2: (storage, offset, shape, strides, …): what follows is requires_grad, hooks and metadata."""
    storage, offset, shape, strides = args[:4]
    return strided(storage, offset, shape, strides, storage.dtype if isinstance(storage, Storage) else None)


def _rebuild_tensor_v3(u: Unpickler, args: Args) -> object:
    """As v2 on an untyped storage, the dtype told apart: for the types that have no storage class."""
    storage, offset, shape, strides, _, _, dtype = args[:7]
    if not isinstance(dtype, TorchDType):
        raise ValueError(f"a tensor has dtype {short_repr(dtype)}")
    if dtype.dtype is None:
        raise ValueError(f"a tensor is of type {dtype}, which is not supported")
    return strided(storage, offset, shape, strides, dtype.dtype)


def _rebuild_parameter(u: Unpickler, args: Args) -> object:
    if not args or not isinstance(args[0], (Tensor, Opaque)):
        raise ValueError("a parameter is not made of a tensor")
    return args[0]


def _rebuild_from_type(u: Unpickler, args: Args) -> object:
    """A tensor with attributes: (rebuild function, class, its arguments, attributes). The attributes are left out."""
    function, kind, inner, _ = args
    if kind in _TENSOR_CLASSES and isinstance(function, Global) and function in TORCH_CALLS:
        return u.reduce(function, inner, new=False)
    return Opaque("torch._tensor", "_rebuild_from_type_v2", args)


_TENSOR_CLASSES = (
    Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter"), Global("torch.nn", "Parameter"),
    Global("torch.nn.parameter", "Buffer"),
)  # fmt: skip

TORCH_CALLS: Mapping[Global, Call] = {
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    Global("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    Global("torch.tensor", "_rebuild_from_type"): _rebuild_from_type,
}
