"""Gzip'ed archives from the command line: what is told of the result needs nothing that goes with the scratch file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckptconv.cli.commands import cli
from tests.unit.helpers.nemo import nemo_gz


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_gzipped_archive_is_resharded(flags: list[str], tmp_path: Path) -> None:
    source, scratch, out = nemo_gz(tmp_path), tmp_path / "scratch", tmp_path / "out.nemo"
    scratch.mkdir()
    ran = CliRunner().invoke(
        cli, ["reshard", str(source), str(out), "--tp", "2", "--loader.scratch", str(scratch), *flags]
    )
    assert ran.exit_code == 0, ran.output
    assert out.exists()
    assert list(scratch.iterdir()) == []
    if flags:
        assert json.loads(ran.stdout)["dst"] == str(out)
