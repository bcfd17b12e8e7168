"""Real archives unpacked from how they are kept, and models made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.judge.conftest import expected, hf, ids
from tests.unit.helpers.nemo import GZIPPED, nemo, nemo_gz

__all__ = ["archive", "expected", "hf", "ids"]
Archive = Callable[[str], Path]


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """archive(NAME) -> the file that NeMo wrote; each is made once, and only read."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("archive")
            made[name] = nemo_gz(folder) if name == GZIPPED else nemo(name, folder)
        return made[name]

    return get
