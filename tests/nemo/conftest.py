"""Real archives unpacked from how they are kept, and models made once per session."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.judge.conftest import expected, hf, ids
from tests.unit.helpers.nemo import GZIPPED, nemo, nemo_gz

__all__ = ["archive", "expected", "hf", "ids"]
Files = dict[str, bytes]
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


def packed(files: Files, path: Path, extra: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    """An archive of these files, by Python's tarfile; `extra` are headers without data."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return path
