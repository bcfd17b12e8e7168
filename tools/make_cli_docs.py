"""docs/cli.md from the command line's own --help: `python tools/make_cli_docs.py` writes it, `--check` says whether it is up to date."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from ckptconv.cli.commands import cli
from ckptconv.errors import CkptconvError, UsageError
from ckptconv.registry import formats, option_rows

PATH = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 100
HEAD = """# The command line

Made from `--help` by `tools/make_cli_docs.py`; a test holds it against the program. `python -m ckptconv` is the same as `ckptconv`.

Results go to stdout, messages and progress to stderr; `--json` makes the result one JSON value. Sizes are decimal: 1 GB is 10⁹ bytes.
A command that fails leaves no DST behind: a result appears whole, in one step, or not at all. The same command run again continues
what was stopped.

## Exit codes

| code | means |
|---|---|
"""
CODES = {
    0: "done; for `verify`: the same",
    CkptconvError.exit_code: "failed, with a message that says what, where and what to do; for `verify`: different",
    UsageError.exit_code: "the request itself is wrong: an unknown option, format or value",
    3: "`verify` only: could not compare, as one of the two cannot be read whole",
}


def page() -> str:
    """The whole document."""
    lines = [HEAD + "\n".join(f"| {code} | {text} |" for code, text in CODES.items())]
    for name, command in commands(cli, "ckptconv"):
        lines += [f"## {name}", "```text\n" + help_text(name, command) + "\n```"]
    lines += [
        "## Options of the formats",
        "Values of `--loader.X` and `--saver.X`, as `ckptconv formats NAME` lists them.",
    ]
    for name, (origin, fmt) in formats().items():
        if origin == "built-in":
            also = ", ".join(f"`{alias}`" for alias in fmt.aliases)
            lines += [f"### {name}", f"{fmt.summary}. Also called {also}." if also else f"{fmt.summary}."]
            lines.append("\n".join(option_table(fmt.Load, fmt.Save)))
    return "\n\n".join(lines) + "\n"


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, by full name."""
    yield name, command
    if isinstance(command, click.Group):
        for below in sorted(command.commands):
            yield from commands(command.commands[below], f"{name} {below}")


def help_text(name: str, command: click.Command) -> str:
    settings = {**cli.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    with click.Context(command, info_name=name, **settings) as context:
        return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def option_table(load: type, save: type) -> Iterator[str]:
    yield "| option | choices | default | |\n|---|---|---|---|"
    for side, kind in (("loader", load), ("saver", save)):
        for row in option_rows(kind):
            choices = ", ".join(f"`{choice}`" for choice in row.choices)
            default = f"`{row.default}`" if row.default else ""
            yield f"| `--{side}.{row.name}` | {choices} | {default} | {row.help} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the file is out of date")
    check = parser.parse_args().check
    wanted, there = page(), PATH.read_text() if PATH.exists() else ""
    if not check:
        PATH.write_text(wanted)
        return 0
    diff = difflib.unified_diff(there.splitlines(), wanted.splitlines(), "docs/cli.md", "--help", lineterm="")
    print("\n".join(diff), end="")
    return int(there != wanted)


if __name__ == "__main__":
    sys.exit(main())
