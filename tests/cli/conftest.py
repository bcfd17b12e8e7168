"""Tiny checkpoints made once, and a console to run commands in."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ckptconv
from ckptconv.cli import main
from ckptconv.testing.checkpoints import write_hf
from tests.cli.helpers.console import Console, Ran


@pytest.fixture
def console(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Console:
    """`console("verify", a, b)`: the command as the script would run it, but in this process."""

    def run(*args: str | Path, code: int | None = 0) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ckptconv", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "100")
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        ran = Ran(status, *capsys.readouterr())
        assert code is None or ran.code == code, ran
        return ran

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders `llama`, `tied` and `mixtral`; the first also as Megatron ranks `m22`, the last as `moe`."""
    root = tmp_path_factory.mktemp("models")
    write_hf(root / "llama", "llama")
    write_hf(root / "tied", "llama-tied")
    write_hf(root / "mixtral", "mixtral")
    ckptconv.convert(root / "llama", root / "m22", saver="mcore", tp=2, pp=2)
    ckptconv.convert(root / "mixtral", root / "moe", saver="mcore", ep=2)
    return root


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """One of the models to damage: `copy("llama")`, or under another name."""

    def one(name: str, to: str = "") -> Path:
        return Path(shutil.copytree(models / name, tmp_path / (to or name)))

    return one
