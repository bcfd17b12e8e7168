"""Archives from the command line: gzip'ed ones, whose scratch file goes before all is told, and --tokenizer, which is for either side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ckptconv.cli.commands import cli
from ckptconv.pipeline import load
from ckptconv.testing.checkpoints import write_hf
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


def run(*args: object) -> str:
    ran = CliRunner().invoke(cli, [*map(str, args)])
    assert ran.exit_code == 0, ran.output
    return ran.output


def test_a_tokenizer_goes_to_the_side_that_takes_one(tmp_path: Path) -> None:
    """An archive names a Hugging Face tokenizer and does not hold it; what is given travels on."""
    source = write_hf(tmp_path / "hf", "llama", vocab_size=200)
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {f"w{i}": i for i in range(197)}}, "added_tokens": []})
    )
    (words / "tokenizer_config.json").write_text("{}")
    archive, two, back = tmp_path / "a.nemo", tmp_path / "two", tmp_path / "back"
    run("convert", source, archive, "--saver", "nemo", "--tokenizer", words, "--saver.tokenizer-name", "me/words")
    assert "me/words" in run("inspect", archive)
    run("convert", archive, two, "--saver", "nemo2", "--tokenizer", words)
    assert list((two / "context").rglob("tokenizer.json"))
    run(
        "convert", archive, back, "--saver", "hf", "--tokenizer", words, "--saver.config-from-args", "--family", "llama"
    )
    assert (back / "tokenizer.json").exists()
    assert load(back).config.vocab == 200  # as its config.json said: a tokenizer may have fewer


def test_a_tokenizer_that_no_side_takes_is_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "llama")
    ran = CliRunner().invoke(
        cli, ["convert", str(source), str(tmp_path / "out"), "--saver", "mcore", "--tokenizer", str(source)]
    )
    assert ran.exit_code != 0
    assert "neither hf as a source nor mcore as a result takes one" in str(ran.exception) + ran.output
