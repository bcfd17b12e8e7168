"""Reads per-rank Megatron files without ckptconv and without Megatron: what each holds, as plain data that can be compared."""

from __future__ import annotations

import hashlib
import pickle
import types
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PLAIN = ("torch", "collections", "argparse", "numpy", "_codecs", "_io", "pathlib", "builtins")
FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Leaf:
    """A tensor's dtype, shape and the first half of the sha256 of its bytes; of anything else, its kind alone."""

    kind: str
    shape: tuple[int, ...] = ()
    digest: str = ""

    def as_json(self) -> list[object]:
        return [self.kind, list(self.shape), self.digest] if self.digest else [self.kind]

    @staticmethod
    def from_json(row: list[Any]) -> Leaf:
        return Leaf(row[0], tuple(row[1]), row[2]) if len(row) > 1 else Leaf(row[0])


def read(path: Path) -> dict[str, Any]:
    """A whole file; classes that are not torch's or Python's become empty stand-ins that keep their attributes."""
    state = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_stub_pickle())
    assert isinstance(state, dict)
    return state


def _stub_pickle() -> Any:
    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return super().find_class(module, name) if module.split(".")[0] in PLAIN else stand_in(module, name)

    package = types.ModuleType("stub_pickle")
    package.__dict__.update(vars(pickle) | {"Unpickler": Unpickler, "load": lambda f, **k: Unpickler(f, **k).load()})
    return package


def stand_in(module: str, name: str) -> type:
    def new(cls: type, *args: object, **_: object) -> object:
        made: Any = object.__new__(cls)
        made.__dict__["args"] = args
        return made

    return type(name, (), {"__new__": new, "__module__": module, "__init__": lambda *_, **__: None})


def iteration_folder(folder: Path) -> Path:
    word = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return folder / ("release" if word == "release" else f"iter_{int(word):07d}")


def rank_states(folder: Path) -> dict[str, dict[str, Any]]:
    """rank folder -> file content."""
    release = iteration_folder(folder)
    return {path.parent.name: read(path) for path in sorted(release.glob(f"*/{FILE}"))}


def leaves(state: dict[str, Any]) -> dict[str, Leaf]:
    """Everything under `model`, `model0`, …; nested names are joined by a slash."""
    found: dict[str, Leaf] = {}
    for key, tree in state.items():
        if key.startswith("model") and isinstance(tree, dict):
            _walk(key, tree, found)
    return found


def _walk(path: str, value: Any, found: dict[str, Leaf]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _walk(f"{path}/{key}", inner, found)
    else:
        found[path] = leaf(value)


def leaf(value: Any) -> Leaf:
    if not isinstance(value, torch.Tensor):
        return Leaf(type(value).__name__)
    data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return Leaf(str(value.dtype).removeprefix("torch."), tuple(value.shape), hashlib.sha256(data).hexdigest()[:32])


def args_of(folder: Path) -> dict[str, Any]:
    """The args of the first rank, as plain values."""
    state = next(iter(rank_states(folder).values()))
    args = state.get("args")
    return {k: _plain(v) for k, v in sorted(vars(args).items())} if isinstance(args, Namespace) else {}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__
