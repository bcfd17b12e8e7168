"""The true size of a vocabulary through .nemo and NeMo 2: padding never becomes words, and what is not known stays so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import ckptconv
from ckptconv.errors import ConfigError, UsageError
from ckptconv.nemo import vocabulary
from ckptconv.testing.checkpoints import write_hf
from tests.nemo.conftest import Archive
from tests.unit.helpers.nemo import TORCH_DIST
from tools.golden_cases import convert
from tools.golden_checks import hf_leaves

PIECES = Path(__file__).parents[1] / "golden" / "nemo" / "tokenizers"  # of 384 and 392 tokens
TRUE, PADDED = 391, 512


def words(folder: Path, count: int = TRUE - 3) -> Path:
    """A tokenizer of Hugging Face: `count` words, and three tokens added to them, one of which is a word too."""
    vocab = {f"w{i}": i for i in range(count + 1)}
    added = [{"id": count - 2 + i, "content": text} for i, text in enumerate(("w3", "<a>", "<b>"))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def few_pieces(folder: Path) -> None:
    shutil.copy(PIECES / "input.model", folder / "tokenizer.model")


def more_pieces(folder: Path) -> None:
    shutil.copy(PIECES / "output.model", folder / "tokenizer.model")


@pytest.fixture(params=[None, few_pieces, words], ids=["no tokenizer", "tokenizer.model of 384", "tokenizer.json"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = write_hf(tmp_path / "hf", "llama", vocab_size=TRUE)
    if request.param is not None:
        request.param(folder)
    return folder


def said(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((folder / "model_config.yaml").read_text())
    return table


def unpacked(place: Path, source: Path, **options: Any) -> Path:
    options.setdefault("saver_options", {})["pack"] = False
    convert(source, place, saver="nemo", vocab_divisor=128, **options)
    return place


WAYS: dict[str, Callable[[Path, Path], Path]] = {
    "ranks": lambda src, dst: unpacked(dst, src, tp=4),
    "distributed": lambda src, dst: unpacked(dst, src, saver_options={"weights": "distributed"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_padding_goes_away_again(way: str, source: Path, tmp_path: Path) -> None:
    made = WAYS[way](source, tmp_path / "made")
    found = ckptconv.load(made).config
    assert (found.vocab, found.vocab_rows) == (TRUE, PADDED)
    table = said(made)
    assert (table["override_vocab_size"], table["true_vocab_size"]) == (
        PADDED,
        TRUE,
    )  # NeMo builds what the former says
    convert(made, tmp_path / "back", saver="hf", saver_options={"template": source})
    assert hf_leaves(tmp_path / "back") == hf_leaves(source)


def test_and_by_way_of_nemo_2_and_another_archive(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "two", saver="nemo2", vocab_divisor=512)
    unpacked(tmp_path / "one", tmp_path / "two", tp=2)
    convert(tmp_path / "one", tmp_path / "again", saver="nemo2")
    for made in ("two", "one", "again"):
        found = ckptconv.load(tmp_path / made).config
        assert (made, found.vocab, found.vocab_rows) == (made, TRUE, PADDED)
    (tmp_path / "again" / "context" / "model.yaml").unlink()
    assert ckptconv.load(tmp_path / "again").config.vocab == TRUE  # io.json has it too
    convert(tmp_path / "again", tmp_path / "back", saver="hf", saver_options={"template": source})
    assert hf_leaves(tmp_path / "back") == hf_leaves(source)


def test_a_tokenizer_that_tells_the_size_needs_no_key(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "llama", vocab_size=392)
    more_pieces(source)
    made = unpacked(tmp_path / "made", source, tp=4)
    assert not {"override_vocab_size", vocabulary.KEY} & said(made).keys()
    assert ckptconv.load(made).config.vocab == 392


def nobody_knows(place: Path, source: Path) -> Path:
    """An archive as somebody else would pad it: rows, and no word of which are real."""
    made = unpacked(place, source, tp=4)
    table = said(made)
    del table[vocabulary.KEY]
    (made / "model_config.yaml").write_text(yaml.safe_dump(table))
    return made


def test_what_is_not_known_stays_unknown(source: Path, tmp_path: Path) -> None:
    made = nobody_knows(tmp_path / "padded", source)
    found = ckptconv.load(made)
    assert (found.config.vocab, found.config.vocab_rows) == (None, PADDED)
    assert any("override_vocab_size 512 counts rows" in note for note in found.extras.notes)
    convert(made, tmp_path / "again", tp=2, saver_options={"pack": False})
    convert(made, tmp_path / "two", saver="nemo2")
    for other in ("again", "two"):
        back = ckptconv.load(tmp_path / other).config
        assert (other, back.vocab, back.vocab_rows) == (other, None, PADDED)
        with pytest.raises(ConfigError, match="--vocab-size"):
            convert(tmp_path / other, tmp_path / "back", saver="hf", saver_options={"template": source})
    convert(made, tmp_path / "hf2", saver="hf", vocab_size=TRUE, saver_options={"template": source})
    assert hf_leaves(tmp_path / "hf2") == hf_leaves(source)


@pytest.mark.parametrize("given", ["", "tokenizer.json"], ids=["folder", "file"])
def test_a_given_tokenizer_tells_the_size_and_travels(given: str, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "llama", vocab_size=TRUE)
    tokenizer = words(tmp_path / "tok")
    made = nobody_knows(tmp_path / "padded", source)
    options = {"tokenizer": tokenizer / given}
    assert ckptconv.load(made, loader_options=options).config.vocab == TRUE
    convert(made, tmp_path / "back", saver="hf", loader_options=options, saver_options={"template": source})
    assert hf_leaves(tmp_path / "back") == hf_leaves(source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    convert(made, tmp_path / "two", saver="nemo2", loader_options=options)
    assert (tmp_path / "two" / "context" / "nemo_tokenizer" / "tokenizer.json").exists()


def test_folders_without_a_tokenizer_are_refused_by_name(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    with pytest.raises(UsageError, match=r"--loader\.tokenizer .*tok: the folder has neither tokenizer\.json"):
        ckptconv.load(archive(TORCH_DIST), loader_options={"tokenizer": tmp_path / "tok"})
    with pytest.raises(UsageError, match=r"--saver\.tokenizer .*none: no such file or folder"):
        unpacked(tmp_path / "made", archive(TORCH_DIST), saver_options={"tokenizer": tmp_path / "none"})


def section(made: Path) -> dict[str, Any]:
    found: dict[str, Any] = said(made)["tokenizer"]
    return {key: found.get(key) for key in ("library", "type", "model", "use_fast")}


def test_a_hugging_face_tokenizer_is_named_as_nemo_loads_it(tmp_path: Path) -> None:
    """library, type, use_fast: what NeMo's own converters write where there is no sentencepiece model."""
    source = words(write_hf(tmp_path / "hf", "llama", vocab_size=TRUE))
    by_name = {"library": "huggingface", "type": None, "model": None, "use_fast": True}
    assert section(unpacked(tmp_path / "a", source)) == by_name
    named = {"tokenizer_name": "org/model"}
    assert section(unpacked(tmp_path / "b", source, saver_options=named)) == by_name | {"type": "org/model"}
    folder = words(tmp_path / "tok")
    given = by_name | {"type": str(folder)}
    assert section(unpacked(tmp_path / "c", source, saver_options={"tokenizer": folder})) == given
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/source"}))
    assert section(unpacked(tmp_path / "d", source)) == by_name | {"type": "org/source"}


def test_a_tokenizer_that_is_named_is_told(tmp_path: Path) -> None:
    source = words(write_hf(tmp_path / "hf", "llama", vocab_size=TRUE))
    made = unpacked(tmp_path / "made", source, saver_options={"tokenizer_name": "org/model"})
    assert any("not packed: NeMo takes org/model" in note for note in ckptconv.load(made).extras.notes)
