"""What a user can get wrong on the command line: each is answered by one clear message and an exit code, and writes nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.helpers.console import Console, tree


class Wrong(NamedTuple):
    """A command line, in which SRC, MOE, RANKS and OUT stand for places; the exit code, and what the message must say."""

    line: str
    code: int
    named: tuple[str, ...]


def wrong(line: str, code: int, *named: str) -> Wrong:
    return Wrong(line, code, named)


TO_MCORE, TO_HF = "convert SRC OUT --saver mcore ", "convert RANKS OUT --saver hf "
FLAGS = {
    "unknown flag": wrong(TO_MCORE + "--tensor-parallel 2", 2, "--tensor-parallel"),
    "misspelt flag": wrong(TO_MCORE + "--replica first", 2, "--replica", "--replicas"),
    "flag without a value": wrong(TO_MCORE + "--tp", 2, "--tp"),
    "flag of another command": wrong("inspect SRC --tp 2", 2, "--tp"),
    "an argument too many": wrong(TO_MCORE + "MOE", 2, "extra argument"),
    "no destination": wrong("convert SRC --saver hf", 2, "DST"),
    "no saver": wrong("convert SRC OUT", 2, "--saver"),
    "unknown command": wrong("konvert SRC OUT", 2, "konvert"),
    "unknown saver": wrong("convert SRC OUT --saver safetensors", 2, "safetensors", "hf (", "mcore (", "legacy ("),
    "unknown loader": wrong("convert SRC OUT --saver hf --loader bin", 2, "bin", "hf (", "mcore ("),
    "unknown format": wrong("formats gguf", 2, "gguf", "hf (", "mcore ("),
    "unknown family": wrong(TO_MCORE + "--family bert", 2, "bert", "hf-llama", "hf-mixtral"),
    "unknown family of ranks": wrong(TO_HF + "--family bert", 2, "bert", "hf-llama", "hf-mixtral"),
    "unknown family listed": wrong("families bert", 2, "bert", "hf-llama", "mcore"),
    "mcore option for hf": wrong(TO_HF + "--saver.experts sequential", 2, "hf", "--saver.experts", "--saver.max-shard-size"),
    "hf option for mcore": wrong(TO_MCORE + "--saver.max-shard-size 1GB", 2, "mcore", "--saver.experts", "--saver.transformer-impl"),
    "option of no format": wrong(TO_MCORE + "--saver.tp 2", 2, "--saver.tp", "--saver.mcore-version"),
    "loader option of legacy": wrong(TO_MCORE + "--loader.checkpoint-version 3", 2, "--loader.checkpoint-version", "--loader.config"),
    "saver option to inspect": wrong("inspect SRC --saver.experts grouped", 2, "--saver.experts", "--loader"),
    "option without a value": wrong(TO_MCORE + "--saver.experts", 2, "--saver.experts"),
    "dtype": wrong(TO_MCORE + "--dtype float8", 2, "--dtype float8", "fp32", "bf16"),
    "optimizer": wrong(TO_MCORE + "--optimizer no", 2, "--optimizer no", "keep", "drop"),
    "replicas": wrong(TO_HF + "--replicas any", 2, "--replicas any", "check", "first"),
    "memory": wrong(TO_MCORE + "--memory lots", 2, "--memory lots", "GB"),
    "workers": wrong(TO_MCORE + "--workers none", 2, "--workers"),
    "shard size": wrong(TO_HF + "--saver.max-shard-size 0", 2, "--saver.max-shard-size 0", "GB"),
    "version": wrong(TO_MCORE + "--mcore-version 7", 2, "7", "0.16"),
    "te version": wrong(TO_MCORE + "--saver.te-version x", 2, "te-version", "x"),
    "form of experts": wrong("convert MOE OUT --saver mcore --saver.experts x", 2, "x", "te-grouped", "sequential"),
    "modules": wrong(TO_MCORE + "--saver.transformer-impl x", 2, "x", "transformer_engine", "local"),
    "iteration": wrong(TO_HF + "--iteration newest", 2, "--iteration newest", "release"),
    "degree of text": wrong(TO_MCORE + "--tp two", 2, "--tp two", "A:B"),
    "degree of three": wrong(TO_MCORE + "--tp 1:2:3", 2, "--tp 1:2:3"),
    "degree of zero": wrong(TO_MCORE + "--pp 0", 2, "--pp 0"),
    "negative degree": wrong(TO_MCORE + "--pp -1", 2, "--pp"),
    "layers of text": wrong(TO_MCORE + "--pp 2 --pp-layers 2;2", 2, "--pp-layers"),
    "iteration of Hugging Face": wrong(TO_MCORE + "--iteration 5", 2, "--iteration 5", "no iterations"),
    "padding for Hugging Face": wrong(TO_HF + "--make-vocab-size-divisible-by 64", 2, "--make-vocab-size-divisible-by"),
    "more ranks than can be": wrong(TO_MCORE + "--tp 100000000", 1, "100,000,000 ranks"),
    "mapping of another family": wrong(TO_MCORE + "--mapping hf-mixtral", 2, "hf-mixtral", "hf-mistral", "hf-llama"),
    "vocabulary": wrong(TO_MCORE + "--vocab-size 0", 2, "--vocab-size"),
    "mapping that is not there": wrong(TO_MCORE + "--mapping gone.toml", 2, "gone.toml"),
    "config that is not there": wrong(TO_MCORE + "--loader.config gone", 2, "gone", "config.json"),
    "template that is not there": wrong(TO_HF + "--saver.template gone", 2, "gone"),
}  # fmt: skip
LAYOUTS = {
    "tp beyond the heads": wrong(TO_MCORE + "--tp 16", 1, "tp", "8"),
    "tp not dividing": wrong(TO_MCORE + "--tp 3", 1, "3"),
    "tp for Hugging Face": wrong(TO_HF + "--tp 2", 1, "--tp"),
    "tp for Hugging Face again": wrong("reshard SRC OUT --tp 2", 1, "--tp"),
    "pp beyond the layers": wrong(TO_MCORE + "--pp 8", 1, "8", "4 layers"),
    "pp not dividing": wrong(TO_MCORE + "--pp 3", 1, "3", "--pp-layers"),
    "vpp beyond the layers": wrong(TO_MCORE + "--pp 2 --vpp 4", 1, "4 layers"),
    "too few stages": wrong(TO_MCORE + "--pp 2 --pp-layers 4", 1, "--pp-layers", "2"),
    "too many stages": wrong(TO_MCORE + "--pp 2 --pp-layers 1,1,2", 1, "--pp-layers", "2"),
    "too few layers": wrong(TO_MCORE + "--pp 2 --pp-layers 1,2", 1, "3", "4"),
    "too many layers": wrong(TO_MCORE + "--pp 2 --pp-layers 3,2", 1, "5", "4"),
    "ep without experts": wrong(TO_MCORE + "--ep 2", 2, "--ep 2", "experts"),
    "ep not dividing": wrong("convert MOE OUT --saver mcore --ep 3", 1, "3", "4"),
    "etp beyond tp": wrong("convert MOE OUT --saver mcore --tp 2 --etp 4", 1, "expert tensor parallel size 4", "2"),
    "experts for legacy": wrong("convert MOE OUT --saver legacy", 1, "experts"),
    "source of another tp": wrong("reshard RANKS OUT --tp 4:2", 1, "tp 4", "2"),
    "source of another pp": wrong("reshard RANKS OUT --pp 1:2", 1, "pp 1", "2"),
    "vocabulary beyond the rows": wrong(TO_MCORE + "--vocab-size 100", 1, "--vocab-size 100", "61"),
    "another family": wrong(TO_MCORE + "--family qwen3", 1, "q_norm"),
    "memory too small": wrong(TO_MCORE + "--memory 1MB", 1, "1,000,000"),
    "no such iteration": wrong(TO_HF + "--iteration 7", 1, "7", "iter_0000001"),
    "no release": wrong(TO_HF + "--iteration release", 1, "release", "iter_0000001"),
    "Hugging Face by the Megatron loader": wrong("convert SRC OUT --saver hf --loader mcore", 1, "source"),
    "Megatron by the Hugging Face loader": wrong("convert RANKS OUT --saver hf --loader hf", 1, "ranks"),
}  # fmt: skip
PLACES = {
    "source missing": wrong("convert GONE OUT --saver hf", 1, "gone"),
    "source missing, loader said": wrong("convert GONE OUT --saver hf --loader hf", 1, "gone"),
    "source missing, inspect": wrong("inspect GONE", 1, "gone"),
    "source a file": wrong("convert FILE OUT --saver hf", 1, "file"),
    "source a file, loader said": wrong("convert FILE OUT --saver hf --loader mcore", 1, "file", "folder"),
    "source empty": wrong("convert EMPTY OUT --saver mcore", 1, "empty", "--loader"),
    "source a pipe": wrong("convert PIPE OUT --saver mcore", 1, "pipe"),
    "source is destination": wrong("convert SRC SRC --saver mcore", 2, "source", "same"),
    "source is destination by a link": wrong("convert SRC LINK --saver mcore", 2, "link", "same"),
    "destination in the source": wrong("convert SRC INSIDE --saver mcore", 2, "inside"),
    "source in the destination": wrong("convert SRC ABOVE --saver mcore --force", 2, "inside"),
    "destination not empty": wrong("convert SRC FULL --saver mcore", 1, "full", "--force"),
    "destination a file": wrong("convert SRC FILE --saver mcore", 1, "file"),
    "destination a pipe": wrong("convert SRC PIPE --saver mcore", 1, "pipe"),
    "destination a link to nothing": wrong("convert SRC DANGLING --saver mcore", 1, "nowhere"),
    "destination below nothing": wrong("convert SRC DEEP --saver mcore", 1, "deep", "make it first"),
    "destination below a file": wrong("convert SRC UNDERFILE --saver mcore", 1, "file"),
    "verify with nothing": wrong("verify SRC GONE", 3, "gone"),
    "verify with a file": wrong("verify FILE SRC", 3, "file"),
    "verify with two files": wrong("verify EMPTY EMPTY", 3, "empty"),
}  # fmt: skip
MATRIX = FLAGS | LAYOUTS | PLACES


@pytest.fixture
def places(models: Path, tmp_path: Path) -> dict[str, Path]:
    """Places by the name they have in the tables; all that can be written to lie in `tmp_path`."""
    for name, model in (("source", "llama"), ("moe", "mixtral"), ("ranks", "m22")):
        shutil.copytree(models / model, tmp_path / name)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "dangling").symlink_to("nowhere/else")
    os.mkfifo(tmp_path / "pipe")
    names = ("ranks", "moe", "out", "gone", "file", "empty", "full", "link", "dangling", "pipe")
    found = {name.upper(): tmp_path / name for name in names}
    return found | {
        "SRC": tmp_path / "source",
        "INSIDE": tmp_path / "source" / "new",
        "ABOVE": tmp_path,
        "DEEP": tmp_path / "deep" / "er",
        "UNDERFILE": tmp_path / "file" / "out",
    }


@pytest.mark.parametrize("case", MATRIX.values(), ids=MATRIX)
def test_mistake_is_answered(
    case: Wrong, places: dict[str, Path], console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places["EMPTY"])
    before = tree(tmp_path), sorted(p.name for p in tmp_path.iterdir())
    ran = console(*(str(places.get(word, word)) for word in case.line.split()), code=case.code)
    assert ran.err.count("rror: ") <= 1, "one message"
    assert "Traceback" not in ran.err
    for name in case.named:
        assert name in ran.err
    assert (tree(tmp_path), sorted(p.name for p in tmp_path.iterdir())) == before, "nothing may be written"


@pytest.mark.parametrize("case", [c for c in FLAGS.values() if c.line.startswith("convert")], ids=lambda c: c.line)
def test_dry_run_makes_the_same_objections(case: Wrong, places: dict[str, Path], console: Console) -> None:
    ran = console(*(str(places.get(word, word)) for word in f"plan {case.line}".split()), code=case.code)
    for name in case.named:
        assert name in ran.err


UNREADABLE = [
    "source/config.json",
    "source/model.safetensors",
    "ranks/hf/config.json",
    "mp_rank_01_001/model_optim_rng.pt",
]


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_is_named(
    name: str, places: dict[str, Path], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's refusal is imitated: root, whom tests may run as, is never refused."""
    real = os.open

    def refuse(path: object, *args: int, **more: Any) -> int:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(str(path), *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    source, loader, saver = ("SRC", "hf", "mcore") if name.startswith("source") else ("RANKS", "mcore", "hf")
    ran = console("convert", places[source], places["OUT"], "--saver", saver, "--loader", loader, code=1)
    assert name in ran.err
    assert "Permission denied" in ran.err
    assert not places["OUT"].exists()
