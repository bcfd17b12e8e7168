"""The commands and Python of the documents, run as they stand: every `sh` block of `ckptconv` lines, every `python` block of the README."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptconv.testing.models import make_hf

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = {"llama": "llama", "mixtral": "mixtral", "qwen": "qwen3"}  # folder that documents may use -> what is in it


def commands(document: Path) -> list[str]:
    blocks = [text for language, text in BLOCK.findall(document.read_text()) if language == "sh"]
    return [line for text in blocks for line in text.splitlines() if line.startswith("ckptconv ")]


WITH_COMMANDS = [document for document in DOCUMENTS if commands(document)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for folder, kind in MODELS.items():
        make_hf(place / folder, kind, dtype="bfloat16")
    return place


@pytest.fixture
def sandbox(models: Path, tmp_path: Path) -> Path:
    for folder in MODELS:
        (tmp_path / folder).symlink_to(models / folder)
    return tmp_path


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=lambda path: path.name)
def test_commands_of_a_document_run_one_after_the_other(
    document: Path, sandbox: Path, run: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox)
    for line in commands(document):
        run(*shlex.split(line, comments=True))


def test_python_of_the_readme_runs(sandbox: Path) -> None:
    text = "\n".join(t for language, t in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python")
    done = subprocess.run(
        [sys.executable, "-c", text + "\nassert q.shape == (64, 64)"], cwd=sandbox, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    gone = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert gone == []


def test_the_readme_is_run_at_all() -> None:
    assert len(commands(ROOT / "README.md")) > 8
