"""NeMo's YAML as plain data with references, and the artifacts that it names; hostile ones give one error."""

from __future__ import annotations

import pytest
import yaml

from ckptconv.dtypes import DTYPES
from ckptconv.errors import FormatError
from ckptconv.nemo import artifacts, model_config, yaml_file
from tests.unit.helpers.nemo_configs import CASES, nemo_of


def test_a_training_configuration_is_read_with_its_references() -> None:
    text = b"""
trainer: {precision: bf16-mixed, devices: "${multiply:2,3}"}
size: {hidden: 64}
model:
  precision: ${trainer.precision}
  encoder_seq_length: 128
  max_position_embeddings: ${.encoder_seq_length}
  hidden_size: ${size.hidden}
  data: {seq_length: "${..encoder_seq_length}", name: "set-${model.hidden_size}"}
  layernorm_epsilon: 1e-5
  created: 2024-01-01
"""
    nemo = model_config.read(text, "hparams.yaml")
    assert nemo.raw == {
        "precision": "bf16-mixed", "encoder_seq_length": 128, "max_position_embeddings": 128, "hidden_size": 64,
        "data": {"seq_length": 128, "name": "set-64"}, "layernorm_epsilon": 1e-5, "created": "2024-01-01",
    }  # fmt: skip
    assert nemo.dtype == DTYPES["bf16"]


DEEP = b"\n".join(b"k%d: &k%d [%s]" % (i, i, b",".join([b"*k%d" % (i - 1)] * 9)) for i in range(1, 12))
REFERRING = b"\n".join(b"k%d: [%s]" % (i, b",".join([b'"${k%d}"' % (i - 1)] * 9)) for i in range(1, 12))
HOSTILE = {
    "aliases that multiply": (b"k0: &k0 [1, 2]\n" + DEEP, "more than 100000 values"),
    "references that multiply": (b"k0: [1, 2]\n" + REFERRING, "more than 100000 values"),
    "many aliases": (b"a: &a 1\nb: [" + b"*a," * 200 + b"]", "more than 100 aliases"),
    "an alias of itself": (b"a: &a [*a]", "nothing complete is called so"),
    "a Python object": (b"a: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object"),
    "a tag of one's own": (b"a: !thing 1", "the tag '!thing'"),
    "a merged table": (b"a: {<<: {b: 1}}", "no plain value"),
    "a key twice": (b"a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
    "depth": (b"a: " + b"[" * 5000, "nested more than 40 deep"),
    "a huge number": (b"a: " + b"9" * 5000, "Exceeds the limit"),
    "a circle of references": (b"a: ${b}\nb: ${a}", "references lead on and on"),
    "a resolver": (b"a: ${oc.env:HOME}", "only references to plain keys"),
    "a reference in a reference": (b"a: ${b.${c}}", "only references to plain keys"),
    "a reference to nothing": (b"a: ${b}", "there is no b"),
    "a reference above the top": (b"a: ${...b}", "only references to plain keys"),
    "two documents": (b"a: 1\n---\nb: 2", "more than one document"),
    "nothing": (b"", "is empty"),
    "a list": (b"- 1", "holds a list"),
    "a number for a key": (b"1: 2", "a key is 1"),
    "no text": (b"\xff\xfe\x00", "not valid YAML"),
    "a control character": (b"a: \x01", "not valid YAML"),
    "a torn flow": (b"a: {b: 1", "not valid YAML"),
    "size": (b"#" * 4_000_001, "more than 4000000"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_yaml_that_is_not_plain_data_gives_one_error(what: str) -> None:
    text, problem = HOSTILE[what]
    with pytest.raises(FormatError, match=r"config\.yaml: ") as caught:
        model_config.read(text, "config.yaml")
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 600


def test_plain_values_are_those_of_omegaconf() -> None:
    """As OmegaConf 2.3 reads the same text."""
    text = b"a: 1e-5\nb: 1e5\nc: 3.e2\nd: .5e3\ne: 1:30\nf: 0x1F\ng: 017\nh: yes\ni: 1_000\nj: ~\nk: -.inf\nl: 1e\nm: x-${a}-${h}"
    assert yaml_file.resolved(yaml_file.read(text, "x"), (), "x") == {
        "a": 1e-5, "b": 1e5, "c": 300.0, "d": ".5e3", "e": 90, "f": 31, "g": 15, "h": True, "i": 1000, "j": None,
        "k": float("-inf"), "l": "1e", "m": "x-1e-05-True",
    }  # fmt: skip


def test_an_alias_is_what_it_stands_for() -> None:
    assert yaml_file.read(b"a: &x [1, {b: 2}]\nc: *x", "x") == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}


def test_what_is_written_is_read_alike_by_pyyaml_and_by_us() -> None:
    """Text that looks like a number to OmegaConf (1e-5) stays text."""
    same = [1, 2]
    table: dict[str, object] = {
        "b": "1e-5",
        "a": 1e-5,
        "n": None,
        "t": "null",
        "l": [same, same],
        "e": "",
        "u": "ü",
        "d": "2024-01-01",
    }
    text = yaml_file.dump(table)
    assert yaml_file.read(text, "x") == yaml.safe_load(text) == table
    assert b"'1e-5'" in text
    assert b"&" not in text


HASH, OTHER = "0123456789abcdef" * 2, "f" * 32


@pytest.mark.parametrize("case", CASES)
def test_artifacts_of_real_archives_have_their_names_back(case: str) -> None:
    member = str(nemo_of(case).tokenizer["model"]).removeprefix("nemo:")
    (found,) = artifacts.find(nemo_of(case).raw, {member, "model_config.yaml"}, case)
    expected = "output.model" if case.startswith("neva") else "tokenizer.model"
    assert (found.key, found.member, found.name) == ("tokenizer.model", member, expected)


def test_artifacts_are_found_wherever_they_are_named() -> None:
    raw = {
        "tokenizer": {"model": None, "vocab_file": f"nemo:{HASH}_{OTHER}_vocab.json", "merge_file": "./merges.txt"},
        "parts": [{"lexicon": f"nemo:{HASH}_a_b.txt"}],
        "other": "nemo_is_a_fish",
    }
    members = {f"{HASH}_{OTHER}_vocab.json", f"{HASH}_a_b.txt", "merges.txt"}
    found = {a.key: (a.member, a.name) for a in artifacts.find(raw, members, "x")}
    assert found == {
        "tokenizer.vocab_file": (f"{HASH}_{OTHER}_vocab.json", "vocab.json"),
        "tokenizer.merge_file": ("merges.txt", "merges.txt"),
        "parts.0.lexicon": (f"{HASH}_a_b.txt", "a_b.txt"),
    }
    (elsewhere,) = artifacts.find({"tokenizer": {"model": "/a/machine/tok.model"}}, set(), "x")
    assert (elsewhere.member, elsewhere.name) == (None, "tok.model")


@pytest.mark.parametrize("member", ["/etc/passwd", "../x", "a/../../b", "a//b", ""])
def test_artifacts_outside_the_archive_are_refused(member: str) -> None:
    with pytest.raises(FormatError, match="not a name inside the archive"):
        artifacts.find({"tokenizer": {"model": f"nemo:{member}"}}, {member}, "x")


def test_artifacts_that_are_missing_are_listed() -> None:
    raw = {"tokenizer": {"model": "nemo:a.model", "vocab_file": "nemo:v.json"}}
    with pytest.raises(FormatError, match=r"x: refers to files that are not there: .*a\.model.*v\.json"):
        artifacts.find(raw, set(), "x")


def test_names_to_write_follow_from_the_content() -> None:
    name = artifacts.stored_name(f"{HASH}_tokenizer.model", b"content")
    assert (
        name
        == artifacts.stored_name("tokenizer.model", b"content")
        != artifacts.stored_name("tokenizer.model", b"other")
    )
    assert artifacts.plain_name(name) == "tokenizer.model"
    assert artifacts.plain_name(HASH + "_") == HASH + "_"
