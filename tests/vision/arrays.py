"""What tests of towers and vision-language models compare: a checkpoint's atoms as arrays, and a folder's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ckptconv import load

Arrays = dict[str, np.ndarray[Any, Any]]


def atoms(path: Path, **wishes: Any) -> Arrays:
    return {key.name: tensor.numpy() for key, tensor in load(path, **wishes).tensors.items()}


def same(a: Arrays, b: Arrays) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert value.tobytes() == b[name].tobytes(), name


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]
