"""Sentencepiece models with new tokens: the bytes NeMo's script writes, what sentencepiece makes of them, and refusals."""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ckptconv.errors import CkptconvError, ExtraMissingError, FormatError, PlanError, UsageError
from ckptconv.executor.execute import ExecuteOptions
from ckptconv.tokenizer.add_tokens import add_tokens
from ckptconv.tokenizer.pieces import MAX_MODEL, extend_model
from ckptconv.tokenizer.tokens import Wanted, read_tokens
from tests.cli.helpers.console import Console
from tests.tokenizer.conftest import GOLDEN, TEXT

INPUT, OUTPUT = GOLDEN / "input.model", GOLDEN / "output.model"
EIGHT = tuple(f"<extra_id_{i}>" for i in range(8))


def loaded(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_the_file_is_the_one_that_nemos_script_writes(console: Console, tmp_path: Path) -> None:
    out = tmp_path / "out.model"
    ran = console("tokenizer", "add-tokens", INPUT, out, *EIGHT)
    assert out.read_bytes() == OUTPUT.read_bytes()
    assert ran.out.splitlines() == [*(f"{384 + i}  {token}" for i, token in enumerate(EIGHT)), "392 tokens in all"]
    assert os.listdir(tmp_path) == ["out.model"]


def test_tokens_of_a_file_come_after_those_named(console: Console, tmp_path: Path) -> None:
    listed, out = tmp_path / "new.txt", tmp_path / "out.model"
    listed.write_text("\r\n".join(EIGHT[2:]))
    ran = console("tokenizer", "add-tokens", INPUT, out, *EIGHT[:2], "--tokens-file", listed, "--json")
    assert out.read_bytes() == OUTPUT.read_bytes()
    ids = {token: 384 + i for i, token in enumerate(EIGHT)}
    facts = {"dst": str(out), "kind": "user-defined", "added": ids, "size": 392, "notes": []}
    assert json.loads(ran.out) == facts


def test_a_second_run_is_refused_as_by_nemos_script(console: Console, tmp_path: Path) -> None:
    ran = console("tokenizer", "add-tokens", OUTPUT, tmp_path / "out.model", *EIGHT, code=2)
    assert all(f"'{token}': piece {384 + i} of" in ran.err for i, token in enumerate(EIGHT))
    assert not (tmp_path / "out.model").exists()


def test_sentencepiece_takes_each_for_one_and_old_texts_as_before(tmp_path: Path) -> None:
    out = tmp_path / "out.model"
    wanted = Wanted(("<a>", "日本", "[img]"))
    assert add_tokens(INPUT, out, wanted).ids == {"<a>": 384, "日本": 385, "[img]": 386}
    old, new = loaded(INPUT), loaded(out)
    assert new.get_piece_size() == 387
    assert [new.id_to_piece(i) for i in range(384)] == [old.id_to_piece(i) for i in range(384)]
    assert new.encode(TEXT) == old.encode(TEXT)
    start = old.encode("the storage")
    assert new.encode("the storage[img]<a>日本") == [*start, 386, 384, 385]
    assert new.decode([*start, 386]) == "the storage[img]"


def test_control_tokens_are_never_found_in_text(tmp_path: Path) -> None:
    out = tmp_path / "out.model"
    add_tokens(INPUT, out, Wanted(("<a>", "two words"), control=True))
    new = loaded(out)
    assert [new.piece_to_id("<a>"), new.piece_to_id("two words")] == [384, 385]
    assert new.is_control(384)
    assert new.is_control(385)
    assert new.encode("the <a>") == loaded(INPUT).encode("the <a>")


def test_a_text_that_is_there_is_refused_whatever_its_type_or_score(tmp_path: Path) -> None:
    there = ("<unk>", "<s>", "<0x41>", "▁te", "K")
    with pytest.raises(UsageError) as caught:
        add_tokens(INPUT, tmp_path / "out.model", Wanted(("<new>", *there)))
    message = str(caught.value)
    assert all(repr(token) in message for token in there)
    assert "<new>" not in message


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "is empty"), ("  ", "is empty"), ("a\nb", "printed"), ("a\x00", "printed"), ("\u200b", "printed"), ("\udcff", "printed")],
)  # fmt: skip
def test_tokens_without_a_text_are_refused(token: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Wanted(("<fine>", token))


def test_all_that_is_wrong_with_the_wishes_is_listed() -> None:
    with pytest.raises(UsageError) as caught:
        Wanted(("<a>", "", "<a>", "\t"))
    assert str(caught.value).splitlines()[1:] == ["  '' is empty", "  '\\t' is empty", "  '<a>' is given 2 times"]
    with pytest.raises(UsageError, match="no tokens"):
        Wanted(())


def test_a_text_that_sentencepiece_would_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="cut into several tokens:\n  'two words'\n"):
        extend_model(INPUT, Wanted(("<a>", "two words")))


def test_lists_of_tokens_are_utf_8_without_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "new.txt"
    path.write_bytes(b"<a>\n\n<b>\n")
    assert read_tokens(path) == ["<a>", "", "<b>"]
    path.write_bytes(b"<a>\xff\n")
    with pytest.raises(FormatError, match="not UTF-8"):
        read_tokens(path)


def test_a_file_is_replaced_only_with_force(console: Console, tmp_path: Path) -> None:
    out = tmp_path / "out.model"
    out.write_text("precious")
    assert "--force" in console("tokenizer", "add-tokens", INPUT, out, "<a>", code=1).err
    assert os.listdir(tmp_path) == ["out.model"]
    assert out.read_text() == "precious"
    console("tokenizer", "add-tokens", INPUT, out, *EIGHT, "--force")
    assert out.read_bytes() == OUTPUT.read_bytes()
    assert os.listdir(tmp_path) == ["out.model"]


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    wanted, source = Wanted(("<a>",)), tmp_path / "in.model"
    source.write_bytes(INPUT.read_bytes())
    for dst in (source, tmp_path / "x" / ".." / "in.model"):
        with pytest.raises(UsageError, match="the same"):
            add_tokens(source, dst, wanted, options=ExecuteOptions(force=True))
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match="is a folder"):
        add_tokens(source, tmp_path / "folder", wanted)
    with pytest.raises(PlanError, match="make it first"):
        add_tokens(source, tmp_path / "nowhere" / "out.model", wanted)
    (tmp_path / "out.model.partial").write_text("of another run")
    with pytest.raises(PlanError, match="in the way"):
        add_tokens(source, tmp_path / "out.model", wanted)
    assert (tmp_path / "out.model.partial").read_text() == "of another run"
    assert source.read_bytes() == INPUT.read_bytes()


@pytest.mark.parametrize("text", [b"", b"not a model", b"PK\x03\x04", b"\x0a\x00", b"\x0a\x05\x0a\x03\xff\xfe\xfd"])
def test_files_of_another_kind_are_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "in.model"
    path.write_bytes(text)
    with pytest.raises(FormatError, match=r"in\.model"):
        extend_model(path, Wanted(("<a>",)))


def test_a_piece_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(INPUT.read_bytes())
    model.pieces[300].piece = model.pieces[299].piece
    path = tmp_path / "in.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"piece 300, .*, is piece 299"):
        extend_model(path, Wanted(("<a>",)))


def test_what_is_no_file_or_too_large_is_refused_unread(tmp_path: Path) -> None:
    wanted, path = Wanted(("<a>",)), tmp_path / "in.model"
    with pytest.raises(FormatError, match="cannot be read"):
        extend_model(path, wanted)
    with path.open("wb") as file:
        file.truncate(MAX_MODEL + 1)
    with pytest.raises(FormatError, match="bytes; more than"):
        extend_model(path, wanted)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="not a regular file"):
        extend_model(path, wanted)


@pytest.mark.parametrize("seed", range(4))
def test_damage_ends_in_a_model_or_a_refusal(tmp_path: Path, seed: int) -> None:
    rng, path, data = random.Random(seed), tmp_path / "in.model", INPUT.read_bytes()
    for _ in range(40):
        damaged = bytearray(data[: rng.choice([len(data), rng.randrange(len(data))])])
        for at in rng.choices(range(len(damaged)), k=rng.choice([1, 3, 50])) if damaged else ():
            damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        with suppress(CkptconvError):
            assert list(extend_model(path, Wanted(("<a>",))).files) == ["in.model"]


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ExtraMissingError, match=r"pip install 'ckptconv\[tokenizer\]'"):
        extend_model(INPUT, Wanted(("<a>",)))
