"""What tests of the documentation share: files written out of a document, plug-ins installed from them, commands run with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptconv.cli import main
from ckptconv.testing.models import make_hf, make_tower

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"<!-- file: (\S+) -->\n+```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Folders that documents may use, beside clip/ and run/. vicuna/ has a tokenizer, of 384 pieces; the last two have heads and experts
# as those they are named after.
BIG = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 4, "num_hidden_layers": 32}
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("llama", {}),
    "mixtral": ("mixtral", {}),
    "qwen": ("qwen3", {}),
    "vicuna": ("llama", {"vocab_size": 400}),
    "Llama-3.1-8B": ("llama3", BIG),
    "Mixtral-8x7B": ("mixtral", {**BIG, "num_hidden_layers": 4, "num_local_experts": 8}),
}

GOLDEN = DOCS.parent / "tests" / "golden"
TRAINED = ("mlm/opt-legacy-bf16-tp2pp1dp2-distopt", "optim/distopt-bf16-tp2dp2")  # parts of one run's checkpoint

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
Install = Callable[..., Path]


@pytest.fixture(scope="session")
def doc_files() -> Callable[[str, Path], Path]:
    """Write the files that a document shows (each block behind `<!-- file: NAME -->`) into a folder."""

    def write(document: str, folder: Path) -> Path:
        blocks = BLOCK.findall((DOCS / document).read_text())
        assert blocks, f"{document} shows no files"
        for name, text in blocks:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return folder

    return write


@pytest.fixture(scope="session")
def install() -> Install:
    """pip install of a project into a folder of its own, as a user does but without the network."""

    def one(project: Path, target: Path) -> Path:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-build-isolation", "--no-index", "--target", target, project], check=True)
        return target

    return one


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `python -m ARGS…`, with folders of installed plug-ins on the path; without any, in this process, which is quicker."""

    def one(*args: str | Path, plugins: tuple[Path, ...] = (), cwd: Path | None = None, code: int = 0) -> Done:
        words = [str(a) for a in args]
        if plugins or words[0] != "ckptconv":
            env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, plugins))}
            done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=cwd, env=env)
        else:
            monkeypatch.setattr(sys, "argv", words)
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
            done = subprocess.CompletedProcess(words, int(ended.value.code or 0), *capsys.readouterr())
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return one


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that documents speak of, in bf16."""
    place = tmp_path_factory.mktemp("models")
    for folder, (kind, config) in MODELS.items():
        make_hf(place / folder, kind, dtype="bfloat16", **config)
    shutil.copy(GOLDEN / "nemo" / "tokenizers" / "input.model", place / "vicuna" / "tokenizer.model")
    make_tower(place / "clip", "CLIPVisionModel", num_attention_heads=16)  # as many as Megatron's have
    return place


@pytest.fixture
def sandbox(models: Path, tmp_path: Path) -> Path:
    """A folder in which they lie, for the commands of one document."""
    for folder in models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    for part in TRAINED:
        shutil.copytree(GOLDEN / part, tmp_path / "run", dirs_exist_ok=True)
    return tmp_path
