"""Element types: one name each, with its spellings in numpy, safetensors and torch. Nothing here reads data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """An element type, one object for each. `numpy` interprets the bits; layout code only ever uses `itemsize`."""

    name: str
    numpy: np.dtype[np.generic]
    safetensors: str
    torch: str
    storage: str
    itemsize: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "itemsize", self.numpy.itemsize)

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        """Pickled by name: it is still the one object when it comes back."""
        return named, (self.name,)

    @property
    def is_float(self) -> bool:
        return self.name.startswith(("fp", "bf"))

    def __repr__(self) -> str:
        return self.name


def _all() -> dict[str, DType]:
    rows = [
        # name, numpy type, safetensors code, torch dtype, torch storage class
        ("fp64", np.float64, "F64", "float64", "DoubleStorage"),
        ("fp32", np.float32, "F32", "float32", "FloatStorage"),
        ("fp16", np.float16, "F16", "float16", "HalfStorage"),
        ("bf16", ml_dtypes.bfloat16, "BF16", "bfloat16", "BFloat16Storage"),
        ("fp8_e4m3", ml_dtypes.float8_e4m3fn, "F8_E4M3", "float8_e4m3fn", "Float8_e4m3fnStorage"),
        ("fp8_e5m2", ml_dtypes.float8_e5m2, "F8_E5M2", "float8_e5m2", "Float8_e5m2Storage"),
        ("int64", np.int64, "I64", "int64", "LongStorage"),
        ("int32", np.int32, "I32", "int32", "IntStorage"),
        ("int16", np.int16, "I16", "int16", "ShortStorage"),
        ("int8", np.int8, "I8", "int8", "CharStorage"),
        ("uint8", np.uint8, "U8", "uint8", "ByteStorage"),
        ("uint16", np.uint16, "U16", "uint16", ""),
        ("uint32", np.uint32, "U32", "uint32", ""),
        ("uint64", np.uint64, "U64", "uint64", ""),
        ("bool", np.bool_, "BOOL", "bool", "BoolStorage"),
    ]
    return {name: DType(name, np.dtype(kind), code, torch, storage) for name, kind, code, torch, storage in rows}


DTYPES: dict[str, DType] = _all()


def named(name: str) -> DType:
    return DTYPES[name]


FP32, FP16, BF16 = DTYPES["fp32"], DTYPES["fp16"], DTYPES["bf16"]
UINT8 = DTYPES["uint8"]
BY_SAFETENSORS = {d.safetensors: d for d in DTYPES.values()}
BY_TORCH = {d.torch: d for d in DTYPES.values()}
BY_STORAGE = {d.storage: d for d in DTYPES.values() if d.storage}
