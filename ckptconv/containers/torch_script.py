"""The parameters of a TorchScript program (torch.jit.save), read as data: none of its code is looked at."""

from __future__ import annotations

from collections.abc import Iterator

from ckptconv.containers import torch_file
from ckptconv.containers.pickled import Opaque
from ckptconv.containers.ranges import Place
from ckptconv.tensor import Tensor

PROGRAM = "__torch__"  # the package that all its classes are in


def read(path: Place, *, check: bool = False) -> object:
    """What a torch file holds; of a program, its tensors by name, as its state_dict() has them."""
    value = torch_file.inspect(path, check=check, script=True).value
    return dict(_tensors(value, "")) if _is_module(value) else value


def _is_module(value: object) -> bool:
    return isinstance(value, Opaque) and value.module.partition(".")[0] == PROGRAM


def _tensors(module: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """A module's own tensors and those of the modules in it; its other attributes are settings."""
    state = module.state if isinstance(module, Opaque) else None
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif _is_module(value):
            yield from _tensors(value, f"{prefix}{name}.")
