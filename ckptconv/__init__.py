"""ckptconv: convert and reshard model checkpoints between frameworks, bit-exactly, without either framework.

Public names are imported when first used, so that `import ckptconv` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptconv.checkpoint import Checkpoint, Key, Stored
    from ckptconv.compare import verify
    from ckptconv.errors import CkptconvError
    from ckptconv.executor.execute import ExecuteOptions, Report
    from ckptconv.pipeline import Job, Prepared, convert, load, prepare
    from ckptconv.tensor import Tensor

_HOMES = {
    "Checkpoint": "checkpoint",
    "CkptconvError": "errors",
    "ExecuteOptions": "executor.execute",
    "Job": "pipeline",
    "Key": "checkpoint",
    "Prepared": "pipeline",
    "Report": "executor.execute",
    "Stored": "checkpoint",
    "Tensor": "tensor",
    "convert": "pipeline",
    "load": "pipeline",
    "prepare": "pipeline",
    "verify": "compare",
}

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "CkptconvError",
    "ExecuteOptions",
    "Job",
    "Key",
    "Prepared",
    "Report",
    "Stored",
    "Tensor",
    "convert",
    "load",
    "prepare",
    "verify",
]


if not TYPE_CHECKING:  # a misspelt name is an error to type checkers too

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'ckptconv' has no attribute {name!r}")
        return getattr(import_module(f"ckptconv.{_HOMES[name]}"), name)
