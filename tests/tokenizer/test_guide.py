"""The commands of docs/guides/tokenizer.md, run as they stand."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from ckptconv.testing.checkpoints import write_hf
from tests.cli.helpers.console import Console
from tests.tokenizer.conftest import GOLDEN

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "tokenizer.md"


def test_commands_of_the_guide_run(
    console: Console, fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast.rename(tmp_path / "llama")
    write_hf(tmp_path / "llama", "llama", vocab_size=290)
    shutil.copy(GOLDEN / "input.model", tmp_path / "tokenizer.model")
    (tmp_path / "new.txt").write_text("<user>\n<assistant>\n")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```shell\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "ckptconv"
        console(*words)
        assert Path(words[3]).exists()
