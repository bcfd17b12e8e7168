"""The commands and Python of the documents, run as they stand, and what they are shown to print.

Every line of an `sh` block that begins with ckptconv or `python -m ckptconv` is run; so is every `$ ckptconv ...` of a
`console` block behind `<!-- run -->`, whose output is held against what follows it there (`...` stands for anything). A
comment `# exit 1` says how a command ends, if not well. (`shell` blocks are run by tests with models of their own.)
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
RUN = re.compile(r"^(?:```(sh)|<!-- run -->\n+```(console))\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(python -m )?ckptconv[. ]")
EXIT = re.compile(r"#.*\bexit (\d)")
LINK = re.compile(r"\]\(([^)#:]+)\)")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Step(NamedTuple):
    """A command line; `shown` is the output, None where the document shows none."""

    line: str
    shown: str | None = None

    @property
    def code(self) -> int:
        found = EXIT.search(self.line)
        return int(found[1]) if found else 0


def steps(document: Path) -> Iterator[Step]:
    for plain, shown, text in RUN.findall(document.read_text()):
        if plain:
            yield from (Step(line.removeprefix("python -m ")) for line in text.splitlines() if COMMAND.match(line))
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:] if shown else ():
            line, _, output = part.partition("\n")
            yield Step(line, output)


RANKS = pytest.mark.xdist_group("ranks")  # several processes: one such test at a time
WITH_COMMANDS = [
    pytest.param(document, id=document.name, marks=RANKS if "ckptconv.trainer" in document.read_text() else ())
    for document in DOCUMENTS
    if any(steps(document))
]


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_commands_of_a_document_run_one_after_the_other(
    document: Path, sandbox: Path, run: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sandbox)
    for step in steps(document):
        done = run(*shlex.split(step.line, comments=True), code=step.code)
        if step.shown is not None:
            wanted = re.escape(step.shown.strip()).replace(r"\.\.\.", ".*")
            printed = [(a + b).strip() for a, b in ((done.stderr, done.stdout), (done.stdout, done.stderr))]
            assert any(re.fullmatch(wanted, text, re.DOTALL) for text in printed), f"{step.line}\n{printed[0]}"


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
    assert sum(1 for _ in steps(ROOT / "README.md")) > 8
    assert any(step.shown for step in steps(ROOT / "README.md"))
