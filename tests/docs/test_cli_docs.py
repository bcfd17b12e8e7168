"""docs/cli.md is what the commands say of themselves, and every command and option says something."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from ckptconv.cli.commands import cli
from ckptconv.testing.checkpoints import write_hf
from tools.make_cli_docs import PATH, commands

COMMANDS = dict(commands(cli, "ckptconv"))


def test_page_is_up_to_date() -> None:
    tool = Path(__file__).parents[2] / "tools" / "make_cli_docs.py"
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + "\nrun tools/make_cli_docs.py"


def test_commands_of_the_contract_are_there() -> None:
    names = {"convert", "reshard", "inspect", "plan convert", "plan reshard", "verify", "formats", "families", "demo"}
    assert {f"ckptconv {name}" for name in names} <= set(COMMANDS)
    assert all(f"## {name}\n" in PATH.read_text() for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_and_every_option_a_text(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert f"{name.split(' plan')[0]}" in (command.epilog or ""), "no example"
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, option.name


def test_every_exit_code_is_told() -> None:
    text = PATH.read_text()
    assert [f"| {code} | " in text for code in (0, 1, 2, 3)] == [True] * 4


def test_exit_codes_are_as_told(tmp_path: Path, run: Callable[..., Any]) -> None:
    a, b, there = write_hf(tmp_path / "a"), write_hf(tmp_path / "b", seed=1), tmp_path / "there"
    run("ckptconv", "convert", a, there, "--saver", "mcore", code=0)
    run("ckptconv", "verify", a, there, code=0)
    run("ckptconv", "verify", a, b, code=1)
    run("ckptconv", "convert", a, there, "--saver", "mcore", code=1)
    run("ckptconv", "inspect", tmp_path / "nothing", code=1)
    run("ckptconv", "convert", a, tmp_path / "x", "--saver", "mcore", "--saver.nothing", "1", code=2)
    run("ckptconv", "convert", a, tmp_path / "x", "--saver", "nothing", code=2)
    run("ckptconv", "convert", a, code=2)
    run("ckptconv", "verify", a, tmp_path / "nothing", code=3)
