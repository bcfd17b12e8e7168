"""Embeddings that grow with a tokenizer: the rows transformers finds, held against torch, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ckptconv import passes
from ckptconv.checkpoint import Key
from ckptconv.dtypes import BF16, FP16, DType
from ckptconv.errors import ConfigError, PlanError, ReplicaError, UsageError, ValueLossError
from ckptconv.executor.execute import ExecuteOptions
from ckptconv.leaves import full
from ckptconv.mapping_files import load_mapping
from ckptconv.nodes import concat
from ckptconv.pipeline import Job, load, open_checkpoint
from ckptconv.tensor import Tensor
from ckptconv.testing.checkpoints import write_hf
from ckptconv.tokenizer.add_tokens import add_tokens
from ckptconv.tokenizer.growth import Growth
from ckptconv.tokenizer.tokens import Wanted
from tests.cli.helpers.console import Console, tree

WANTED = Wanted(("<a>", "<b>"))
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 290  # as many as the tokenizer has words


def model(place: Path, kind: str = "llama", dtype: str = "bf16", **config: Any) -> Path:
    return write_hf(place / "model", kind, dtype=dtype, **{"vocab_size": ROWS, **config})


def expected(old: torch.Tensor, init: str, n: int) -> torch.Tensor:
    """The old rows and n new ones, by torch."""
    row = {"zero": old[-1] * 0, "last": old[-1], "mean": old.double().mean(0).to(old.dtype)}[init]
    return torch.cat([old, row.expand(n, -1)])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("init", passes.FILLS)
def test_new_rows_are_as_asked_for_and_all_else_as_it_was(fast: Path, tmp_path: Path, init: str, dtype: str) -> None:
    source = model(tmp_path, dtype=dtype)
    add_tokens(fast, tmp_path / "out", WANTED, Growth(source, 320, init))
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    grown = {EMBED, HEAD}
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name], expected(old[name], init, 30)) for name in grown)
    assert all(torch.equal(new[name], old[name]) for name in old.keys() - grown)
    before, after = (json.loads((place / "config.json").read_text()) for place in (source, tmp_path / "out"))
    assert after == {**before, "vocab_size": 320}
    about = json.loads((tmp_path / "out" / "ckptconv.json").read_text())["about"]
    assert about["vocabulary"] == {"rows": 320, "rows_before": ROWS, "true_before": ROWS, "init": init}
    assert about["tokenizer"]["added"] == {"<a>": 290, "<b>": 291}


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
def test_transformers_loads_the_model_with_its_tokenizer(fast: Path, tmp_path: Path, kind: str) -> None:
    source = model(tmp_path, kind, "fp32")
    add_tokens(fast, tmp_path / "out", WANTED, Growth(source, 292))
    grown, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("the fox<b>", return_tensors="pt").input_ids
    assert ids[0, -1] == 291
    with torch.no_grad():
        logits = grown(ids).logits
        before = AutoModelForCausalLM.from_pretrained(source)(ids[:, :-1]).logits
    assert logits.shape[-1] == 292
    torch.testing.assert_close(logits[:, :-1, :ROWS], before)
    tied = grown.get_input_embeddings().weight is grown.get_output_embeddings().weight
    assert tied == (kind == "llama-tied")


def test_the_tokenizer_comes_from_its_own_folder_and_the_rest_from_the_checkpoint(slow: Path, tmp_path: Path) -> None:
    source = model(tmp_path, vocab_size=384)
    for folder, text in ((slow, "of the tokenizer"), (source, "of the model")):
        (folder / "README.md").write_text(text)
    (source / "tokenizer.json").write_text("of another tokenizer")
    (source / "generation_config.json").write_text("{}")
    add_tokens(slow, tmp_path / "out", WANTED, Growth(source, 386))
    written = tree(tmp_path / "out")
    weights = {"model.safetensors", "config.json", "generation_config.json", "README.md", "ckptconv.json"}
    assert set(written) == weights | {"tokenizer.model", "tokenizer_config.json"}
    assert written["README.md"] == b"of the model"


def test_rows_that_are_there_stay_unless_they_are_said_to_be_padding(fast: Path, tmp_path: Path) -> None:
    source = model(tmp_path, vocab_size=320)
    old = load_file(source / "model.safetensors")[EMBED]
    kept = add_tokens(fast, tmp_path / "kept", WANTED, Growth(source, 320, "zero"))
    assert "those from 290 on stay as they are" in kept.notes[0]
    assert torch.equal(load_file(tmp_path / "kept" / "model.safetensors")[EMBED], old)
    anew = add_tokens(fast, tmp_path / "anew", WANTED, Growth(source, 300, "zero", vocab=290))
    assert anew.notes == ()
    assert torch.equal(load_file(tmp_path / "anew" / "model.safetensors")[EMBED], expected(old[:290], "zero", 10))


def test_a_mean_does_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = load(model(tmp_path, dtype="fp32")).tensors[Key("embed.weight")]
    whole = passes.mean(Key("embed.weight"), tensor, 0)
    monkeypatch.setattr(passes, "CHUNK", 1000)
    np.testing.assert_allclose(passes.mean(Key("embed.weight"), tensor, 0), whole, rtol=1e-6)
    assert whole.shape == (1, 32)


def rows(values: list[list[float]], dtype: DType) -> Tensor:
    return concat([concat([full((1, 1), dtype, value) for value in row], 1) for row in values], 0)


@pytest.mark.parametrize(("dtype", "half", "least"), [(BF16, 2.0**-8, 2.0**-38), (FP16, 2.0**-11, 2.0**-24)])
def test_a_mean_is_rounded_once(dtype: DType, half: float, least: float) -> None:
    """It lies just beside the middle between two values. Rounded to fp32 first it would be that middle, and go to the even one."""
    for sign, more, expected in (
        (1, least, 1 + 2 * half),
        (1, -least, 1),
        (-1, least, -1),
        (-1, -least, -1 - 2 * half),
    ):
        table = rows([[sign * 3], [sign * 3 * half], [more]], dtype)
        assert table.numpy().astype(np.float64).mean() != sign * (1 + half)
        assert float(passes.mean(Key("embed.weight"), table, 0)[0, 0]) == expected


def test_a_row_of_constants_is_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=(7, 5)).astype(ml_dtypes.bfloat16)
    table = rows(values.astype(float).tolist(), BF16)
    row = passes.mean_row(Key("embed.weight"), table, 0)
    expected = torch.tensor(values.astype(np.float64)).mean(0, keepdim=True).bfloat16().expand(3, 5)
    assert row.expand(0, 3).numpy().astype(np.float64).tolist() == expected.double().tolist()
    alone = passes.mean_row(Key("bias"), table.narrow(1, 0, 1).squeeze(1), 0)
    assert alone.numpy().astype(np.float64).tolist() == expected[0, :1].double().tolist()


def test_moments_of_an_optimizer_grow_by_zeros(tmp_path: Path) -> None:
    _, checkpoint = open_checkpoint(Job(model(tmp_path)))
    embed = checkpoint.tensors[Key("embed.weight")]
    moments = {Key("embed.weight", "exp_avg"): embed}
    grown = passes.grow_vocabulary(
        replace(checkpoint, tensors=moments), 300, passes.last_row, load_mapping(checkpoint.origin.mapping)
    )
    (tensor,) = grown.tensors.values()
    assert not tensor.numpy()[ROWS:].any()
    assert (grown.config.vocab, grown.config.vocab_rows) == (300, 300)
    with pytest.raises(ConfigError, match="cannot grow to 289"):
        passes.grow_vocabulary(checkpoint, 289, passes.last_row, load_mapping(checkpoint.origin.mapping))


def test_infinities_have_no_mean(fast: Path, tmp_path: Path) -> None:
    source = model(tmp_path)
    tensors = load_file(source / "model.safetensors")
    tensors[EMBED][5, 3] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueLossError, match=r"embed\.weight: the mean of its rows is not finite"):
        add_tokens(fast, tmp_path / "out", WANTED, Growth(source, 300))
    assert not (tmp_path / "out").exists()
    add_tokens(fast, tmp_path / "out", WANTED, Growth(source, 300, "last"))


def test_copies_that_should_be_equal_are_compared(fast: Path, tmp_path: Path) -> None:
    source = model(tmp_path, "llama-tied")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBED] + 1}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ReplicaError, match="lm_head"):
        add_tokens(fast, tmp_path / "out", WANTED, Growth(source, 300, "zero"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"rows": 291}, "the tokenizer has 292 tokens now"),
        ({"rows": 295}, "the checkpoint has 300 rows; none may be lost"),
        ({"rows": 400, "init": "random"}, "expected last, zero, mean"),
        ({"rows": 400, "vocab": 301}, "the embedding has only 300 rows"),
    ],
)
def test_what_cannot_be_is_refused(fast: Path, tmp_path: Path, asked: dict[str, Any], says: str) -> None:
    source = model(tmp_path, vocab_size=300)
    with pytest.raises((UsageError, ConfigError), match=says):
        add_tokens(fast, tmp_path / "out", WANTED, Growth(source, **asked))


def test_places_and_a_lone_sentencepiece_model_are_refused(fast: Path, slow: Path, tmp_path: Path) -> None:
    source = model(tmp_path)
    with pytest.raises(UsageError, match="give the folder"):
        add_tokens(slow / "tokenizer.model", tmp_path / "out", WANTED, Growth(source, 400))
    for dst in (source, source / "out"):
        with pytest.raises(UsageError, match="inside the other"):
            add_tokens(fast, dst, WANTED, Growth(source, 300), ExecuteOptions(force=True))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(PlanError, match="--force"):
        add_tokens(fast, tmp_path / "out", WANTED, Growth(source, 300))


def test_one_folder_may_be_both_tokenizer_and_checkpoint(console: Console, fast: Path, tmp_path: Path) -> None:
    write_hf(fast, "llama", vocab_size=ROWS)
    words = ("tokenizer", "add-tokens", fast, tmp_path / "out", "<a>", "--checkpoint", fast, "--vocab-rows", "292")
    ran = console(*words, "--init", "last")
    assert ran.out == "290  <a>\n291 tokens in all\n"
    assert "stay as it" not in ran.err
    assert {"tokenizer.json", "model.safetensors", "config.json"} < set(tree(tmp_path / "out"))
    asked = {
        ("--init", "best"): "expected last, zero, mean",
        ("--memory", "1KB"): "too small",
    }
    for more, says in asked.items():
        assert says in console(*words, *more, "--force", code=None).err


@pytest.mark.parametrize("more", [("--vocab-rows", "9"), ("--init", "zero"), ("--vocab-size", "4")])
def test_options_about_a_checkpoint_need_one(
    console: Console, fast: Path, tmp_path: Path, more: tuple[str, str]
) -> None:
    ran = console("tokenizer", "add-tokens", fast, tmp_path / "out", "<a>", *more, code=2)
    assert f"{more[0]}: about a checkpoint" in ran.err
    ran = console("tokenizer", "add-tokens", fast, tmp_path / "out", "<a>", "--checkpoint", fast, code=2)
    assert "--vocab-rows" in ran.err
