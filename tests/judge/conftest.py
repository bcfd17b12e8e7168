"""Models made once per session for the judge's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.testing.models import hf_logits, make_hf, token_ids

Made = Callable[..., Path]


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """hf("llama-tied", num_hidden_layers=8) -> the folder of that model."""
    made: dict[object, Path] = {}

    def get(kind: str, **over: Any) -> Path:
        key = (kind, tuple(sorted(over.items())))
        if key not in made:
            made[key] = make_hf(tmp_path_factory.mktemp(kind) / "hf", kind, **over)
        return made[key]

    return get


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.from_numpy(token_ids())


@pytest.fixture(scope="session")
def expected() -> Callable[[Path], Any]:
    """transformers' logits of a folder."""
    known: dict[Path, Any] = {}

    def get(folder: Path) -> Any:
        if folder not in known:
            known[folder] = hf_logits(folder, token_ids())
        return known[folder]

    return get
