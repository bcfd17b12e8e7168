"""Hugging Face tokenizers with new tokens, held against the tokenizers library, and read back by transformers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from ckptconv.errors import CkptconvError, FormatError, PlanError, UsageError
from ckptconv.executor.execute import ExecuteOptions
from ckptconv.executor.manifest import damage, read_manifest
from ckptconv.tokenizer.add_tokens import add_tokens
from ckptconv.tokenizer.folder import extend_folder
from ckptconv.tokenizer.hf_json import ADDED, MAX_TOKENIZER, SETTINGS, SPECIAL, TOKENIZER
from ckptconv.tokenizer.tokens import Wanted
from tests.cli.helpers.console import Console, tree
from tests.tokenizer.conftest import GOLDEN, TEXT

NEW = ("<a>", "two words", "日本")
MODEL = "tokenizer.model"
KINDS = pytest.mark.parametrize("control", [False, True], ids=["user-defined", "control"])


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def old_style(folder: Path) -> None:
    """The further files that transformers 4 wrote beside tokenizer.json."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    decoder = {str(i): {"content": text, **flags, "special": True} for i, text in enumerate(("<s>", "</s>"))}
    edit(folder / SETTINGS, lambda table: table.update(added_tokens_decoder=decoder))
    (folder / ADDED).write_text('{\n  "</s>": 1,\n  "<s>": 0\n}\n')
    (folder / SPECIAL).write_text('{\n  "bos_token": "<s>",\n  "additional_special_tokens": [\n    "</s>"\n  ]\n}\n')


@KINDS
def test_tokenizer_json_is_as_the_library_itself_extends_it(fast: Path, tmp_path: Path, control: bool) -> None:
    extended = add_tokens(fast, tmp_path / "out", Wanted(NEW, control))
    assert extended.ids == {"<a>": 290, "two words": 291, "日本": 292}
    theirs = Tokenizer.from_file(str(fast / TOKENIZER))
    theirs.add_tokens([AddedToken(token, normalized=False, special=control) for token in NEW])
    assert (tmp_path / "out" / TOKENIZER).read_bytes().decode() == theirs.to_str(pretty=True)


@KINDS
def test_transformers_encodes_each_as_one_id_and_old_texts_as_before(fast: Path, tmp_path: Path, control: bool) -> None:
    old_style(fast)
    extended = add_tokens(fast, tmp_path / "out", Wanted(NEW, control))
    old, new = AutoTokenizer.from_pretrained(fast), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(new) == extended.size == 293
    assert new(TEXT).input_ids == old(TEXT).input_ids
    assert [new(token).input_ids for token in NEW] == [[290], [291], [292]]
    assert new("fox<a>日本 two words").input_ids == [*old("fox").input_ids, 290, 292, *old(" ").input_ids, 291]
    assert new.decode(new("fox<a>").input_ids, skip_special_tokens=True) == ("fox" if control else "fox<a>")
    assert set(NEW) <= set(new.all_special_tokens) or not control


@KINDS
def test_every_file_that_lists_tokens_gains_them(fast: Path, tmp_path: Path, control: bool) -> None:
    old_style(fast)
    add_tokens(fast, tmp_path / "out", Wanted(NEW, control))
    settings = json.loads((tmp_path / "out" / SETTINGS).read_text())
    decoder = settings["added_tokens_decoder"]
    assert list(decoder) == ["0", "1", "290", "291", "292"]
    assert decoder["291"] == {**decoder["0"], "content": "two words", "special": control}
    assert settings.get("additional_special_tokens") == (list(NEW) if control else None)
    added = (tmp_path / "out" / ADDED).read_text()
    assert added == '{\n  "</s>": 1,\n  "<a>": 290,\n  "<s>": 0,\n  "two words": 291,\n  "日本": 292\n}\n'
    special = json.loads((tmp_path / "out" / SPECIAL).read_text())
    assert special["additional_special_tokens"] == ["</s>", *(NEW if control else ())]


def test_of_a_sentencepiece_folder_the_model_grows_and_transformers_reads_it(slow: Path, tmp_path: Path) -> None:
    eight = tuple(f"<extra_id_{i}>" for i in range(8))
    extended = add_tokens(slow, tmp_path / "out", Wanted(eight))
    assert (tmp_path / "out" / MODEL).read_bytes() == (GOLDEN / "output.model").read_bytes()
    assert (tmp_path / "out" / SETTINGS).read_bytes() == (slow / SETTINGS).read_bytes()
    old, new = AutoTokenizer.from_pretrained(slow), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(new) == extended.size == 392
    assert new(TEXT).input_ids == old(TEXT).input_ids
    assert new(f"the<extra_id_3>{eight[7]}").input_ids == [*old("the").input_ids, 387, 391]


def both(slow: Path) -> Path:
    """tokenizer.json, as transformers makes it of the sentencepiece model, beside that."""
    AutoTokenizer.from_pretrained(slow).save_pretrained(slow)
    assert (slow / TOKENIZER).exists()
    assert (slow / MODEL).exists()
    return slow


@KINDS
def test_both_forms_of_one_tokenizer_agree(slow: Path, tmp_path: Path, control: bool) -> None:
    extended = add_tokens(both(slow), tmp_path / "out", Wanted(("<a>", "<b>"), control))
    assert {MODEL, TOKENIZER, SETTINGS} == set(extended.files)
    assert extended.ids == {"<a>": 384, "<b>": 385}
    assert extended.notes == ()
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert new.convert_tokens_to_ids(["<a>", "<b>"]) == [384, 385]
    (tmp_path / "out" / TOKENIZER).unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<a>", "<b>"]) == [384, 385]


def test_a_model_whose_ids_are_taken_stays_and_that_is_told(console: Console, slow: Path, tmp_path: Path) -> None:
    fast = AutoTokenizer.from_pretrained(both(slow))
    fast.add_tokens(["<pad>"])
    fast.save_pretrained(slow)
    ran = console("tokenizer", "add-tokens", slow, tmp_path / "out", "<a>")
    assert ran.out == "385  <a>\n386 tokens in all\n"
    assert "tokenizer.model stays as it is: it has 384 pieces" in ran.err
    assert (tmp_path / "out" / MODEL).read_bytes() == (slow / MODEL).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<a>").input_ids[-1] == 385


def test_a_model_that_counts_otherwise_stays_and_that_is_told(slow: Path, tmp_path: Path) -> None:
    vocabulary = sentencepiece_model_pb2.ModelProto.FromString((both(slow) / MODEL).read_bytes())
    vocabulary.pieces[300].piece, vocabulary.pieces[301].piece = (vocabulary.pieces[i].piece for i in (301, 300))
    (slow / MODEL).write_bytes(vocabulary.SerializeToString())
    extended = add_tokens(slow, tmp_path / "out", Wanted(("<a>",)))
    assert "its ids are not those of tokenizer.json" in extended.notes[0]
    assert MODEL not in extended.files


def test_a_model_of_tiktoken_stays_and_that_is_told(fast: Path, tmp_path: Path) -> None:
    (fast / MODEL).write_text("IQ== 0\nIg== 1\n")
    extended = add_tokens(fast, tmp_path / "out", Wanted(("<a>",)))
    assert "tiktoken" in extended.notes[0]
    assert (tmp_path / "out" / MODEL).read_text() == "IQ== 0\nIg== 1\n"


def test_known_texts_are_refused_wherever_they_are_listed(fast: Path) -> None:
    old_style(fast)
    edit(fast / SETTINGS, lambda table: table["added_tokens_decoder"].update({"7": {"content": "<only here>"}}))
    edit(fast / ADDED, lambda table: table.update({"<or here>": 8}))
    there = ["q", "</s>", "<only here>", "<or here>"]
    with pytest.raises(UsageError) as caught:
        extend_folder(fast, Wanted(("<new>", *there)))
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]] == [repr(t) for t in there]


def test_side_files_travel_and_the_rest_is_told(fast: Path, tmp_path: Path) -> None:
    (fast / "README.md").write_text("about it")
    (fast / "chat_template.jinja").write_text("{{ x }}")
    (fast / "model.safetensors").write_bytes(b"weights")
    (fast / "config.json").write_text("{}")
    extended = add_tokens(fast, tmp_path / "out", Wanted(("<a>",)))
    assert extended.notes == ("left behind in the source: config.json, model.safetensors",)
    written = tree(tmp_path / "out")
    assert set(written) == {"README.md", "chat_template.jinja", "ckptconv.json", SETTINGS, TOKENIZER}
    assert written["README.md"] == b"about it"
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert damage(tmp_path / "out", manifest) == []
    assert manifest.about["tokenizer"] == {"kind": "user-defined", "added": {"<a>": 290}, "size": 291}


def test_a_folder_is_replaced_only_with_force_and_nothing_is_left_half_written(fast: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out", Wanted(("<a>",))
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(PlanError, match="--force"):
        add_tokens(fast, out, wanted)
    with pytest.raises(UsageError, match="already"):
        add_tokens(fast, out, Wanted(("q",)), options=ExecuteOptions(force=True))
    assert tree(out) == {"precious": b"x"}
    add_tokens(fast, out, wanted, options=ExecuteOptions(force=True))
    assert set(tree(out)) == {"ckptconv.json", SETTINGS, TOKENIZER}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast", "out"]
    for dst in (fast, fast / "out", tmp_path):
        with pytest.raises(UsageError, match="inside the other"):
            add_tokens(fast, dst, wanted, options=ExecuteOptions(force=True))


@pytest.mark.parametrize("name", [TOKENIZER, SETTINGS, ADDED, SPECIAL, MODEL, "README.md"])
def test_links_out_of_the_folder_are_not_followed(fast: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (fast / name).unlink(missing_ok=True)
    (fast / name).symlink_to(secret)
    with pytest.raises(FormatError, match="leaves the folder"):
        add_tokens(fast, tmp_path / "out", Wanted(("<a>",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (TOKENIZER, "{", "not valid JSON"),
        (TOKENIZER, "[]", "expected a table"),
        (TOKENIZER, "{}", "cannot load it"),
        (TOKENIZER, '{"a": 1, "a": 2}', "twice"),
        (TOKENIZER, "[" * 100_000, "not valid JSON"),
        (SETTINGS, '{"added_tokens_decoder": []}', "expected a table of ids"),
        (SETTINGS, '{"added_tokens_decoder": {"0": "<s>"}}', "has no content"),
        (SETTINGS, '{"added_tokens_decoder": {"-1": {"content": "<s>"}}}', "expected a number from 0"),
        (SETTINGS, '{"added_tokens_decoder": {"400": {"content": "<x>"}}}', "goes on to 400"),
        (ADDED, '{"\\ud800": 0}', "half a character"),
        (ADDED, '{"<x>": "many"}', "expected a number from 0"),
        (ADDED, '{"<x>": true}', "expected a number from 0"),
        (ADDED, '{"<x>": 1e400}', "number"),
        (SPECIAL, "null", "expected a table"),
        (MODEL, "neither pieces nor ranks", "not a sentencepiece model"),
    ],
)
def test_wrong_files_are_named(fast: Path, name: str, text: str, says: str) -> None:
    (fast / name).write_text(text)
    with pytest.raises(FormatError, match=says) as caught:
        extend_folder(fast, Wanted(("<a>",)))
    assert name in str(caught.value)


def test_ids_that_the_library_does_not_give_are_refused(fast: Path) -> None:
    entry = {"id": 500, "content": "<x>", "special": True}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    edit(fast / TOKENIZER, lambda table: table["added_tokens"].append({**entry, **flags}))
    with pytest.raises(FormatError, match="'<x>' is id 500; the tokenizers library gives it 290"):
        extend_folder(fast, Wanted(("<a>",)))


def test_a_folder_without_a_tokenizer_or_with_a_huge_one_is_refused(fast: Path, tmp_path: Path) -> None:
    with (fast / TOKENIZER).open("r+b") as file:
        file.truncate(MAX_TOKENIZER + 1)
    with pytest.raises(FormatError, match="bytes; more than"):
        extend_folder(fast, Wanted(("<a>",)))
    (fast / TOKENIZER).unlink()
    with pytest.raises(FormatError, match=r"expected tokenizer\.json, or a sentencepiece tokenizer\.model"):
        extend_folder(fast, Wanted(("<a>",)))
    with pytest.raises(FormatError, match="cannot be read"):
        add_tokens(tmp_path / "nowhere", tmp_path / "out", Wanted(("<a>",)))


@pytest.mark.parametrize("seed", range(4))
def test_damage_ends_in_a_tokenizer_or_a_refusal(fast: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = (fast / TOKENIZER).read_bytes()
    for _ in range(30):
        damaged = bytearray(data)
        for at in rng.choices(range(len(data)), k=rng.choice([1, 3, 10])):
            damaged[at] = rng.choice(b'{}[],:"0129nx\\')
        (fast / TOKENIZER).write_bytes(damaged)
        with suppress(CkptconvError):
            extended = extend_folder(fast, Wanted(("<new>",)))
            assert extended.ids["<new>"] == extended.size - 1


def test_the_source_is_left_as_it_was(fast: Path, tmp_path: Path) -> None:
    before = shutil.copytree(fast, tmp_path / "before")
    add_tokens(fast, tmp_path / "out", Wanted(NEW))
    assert tree(fast) == tree(before)


def test_lists_of_tokens_that_stay_as_they_are_are_told(console: Console, fast: Path, tmp_path: Path) -> None:
    for name in ("spiece.model", "vocab.json", "README.md"):
        (fast / name).write_text("x")
    ran = console("tokenizer", "add-tokens", fast, tmp_path / "out", "<a>")
    assert "note: copied as they are, without the new tokens: spiece.model, vocab.json\n" in ran.err
    assert (tmp_path / "out" / "spiece.model").read_text() == "x"
