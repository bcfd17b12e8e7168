"""`ckptconv verify`: each kind of difference made for real, each exit code, checkpoints of any two formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptconv
from ckptconv.compare import KINDS
from ckptconv.testing.checkpoints import write_hf
from tests.cli.helpers.console import Console, bump, edit_hf, edit_rank

Copy = Callable[..., Path]


def kinds(console: Console, a: Path, b: Path, *more: str) -> dict[str, list[str]]:
    """kind -> names, as --json says; the exit code must fit."""
    ran = console("verify", a, b, "--json", *more, code=None)
    facts = json.loads(ran.out)
    assert ran.code == (0 if facts["same"] else 1)
    assert facts["same"] == (not facts["differences"])
    found: dict[str, list[str]] = {}
    for row in facts["differences"]:
        assert row["kind"] in KINDS
        found.setdefault(row["kind"], []).append(row["name"])
    return found


def test_same_across_formats_and_layouts_is_0(console: Console, models: Path) -> None:
    ran = console("verify", models / "llama", models / "m22")
    assert ran.out.startswith("same (39 tensors, ")
    assert kinds(console, models / "m22", models / "llama") == {}


def test_json_has_the_documented_keys(console: Console, models: Path) -> None:
    facts = json.loads(console("verify", models / "llama", models / "llama", "--json").out)
    assert facts == {"same": True, "tensors": 39, "bytes": 82112, "differences": [], "notes": []}


def test_values(console: Console, models: Path, copy: Copy) -> None:
    other = copy("llama")
    edit_hf(other, lambda t: bump(t, "model.layers.2.mlp.up_proj.weight", 3, 5))
    ran = console("verify", models / "llama", other, code=1)
    assert "values: layers.2.mlp.up.weight: 1 of 1536 differ, the first at [3, 5]" in ran.out
    assert "different: 1 differences" in ran.out
    assert kinds(console, models / "m22", other) == {"values": ["layers.2.mlp.up.weight"]}


def test_a_wrong_zero_sign_is_a_difference(console: Console, copy: Copy) -> None:
    """Bit for bit: -0.0 equals 0.0 to a program that compares numbers."""
    one, two = copy("llama", "one"), copy("llama", "two")
    for folder, zero in ((one, 0.0), (two, -0.0)):
        edit_hf(folder, lambda t, zero=zero: t["model.norm.weight"].fill_(zero))  # type: ignore[misc]
    assert kinds(console, one, two) == {"values": ["norm.weight"]}


def test_dtype(console: Console, models: Path, tmp_path: Path) -> None:
    ckptconv.convert(models / "llama", tmp_path / "fp32", saver="hf", dtype="fp32")
    found = kinds(console, models / "llama", tmp_path / "fp32")
    assert set(found) == {"dtype"}, "the values are the same"
    assert len(found["dtype"]) == 39


def test_dtype_and_values(console: Console, models: Path, tmp_path: Path) -> None:
    ckptconv.convert(models / "llama", tmp_path / "fp32", saver="hf", dtype="fp32")
    edit_hf(tmp_path / "fp32", lambda t: bump(t, "model.norm.weight", 0))
    found = kinds(console, models / "llama", tmp_path / "fp32")
    assert found["values"] == ["norm.weight"]
    assert len(found["dtype"]) == 39


def test_missing(console: Console, models: Path, tmp_path: Path) -> None:
    shorter = write_hf(tmp_path / "shorter", "llama", num_hidden_layers=3)
    ran = console("verify", models / "llama", shorter, code=1)
    assert "missing: layers.3.attn.q.weight: only in A" in ran.out
    biased = write_hf(tmp_path / "biased", "llama-bias")
    assert "layers.0.attn.q.bias" in kinds(console, models / "llama", biased)["missing"]


def test_shape(console: Console, models: Path, tmp_path: Path) -> None:
    wider = write_hf(tmp_path / "wider", "llama", intermediate_size=56)
    found = kinds(console, models / "llama", wider)
    assert "layers.0.mlp.gate.weight" in found["shape"]
    assert "layers.0.mlp.gate.weight" not in found.get("values", [])


def test_padding_that_is_not_the_same(console: Console, models: Path, copy: Copy) -> None:
    other = copy("m22")
    edit_rank(other, "01_001", lambda saved: bump(saved["model"], "output_layer.weight", -1, 0))
    found = kinds(console, models / "m22", other)
    assert found == {"padding": ["head.weight"]}
    assert kinds(console, models / "llama", other) == {}, "what only pads is none of the model's"


def test_padding_of_unknown_amount(console: Console, models: Path, tmp_path: Path) -> None:
    """Two sizes of vocabulary, and nothing says which rows are real."""
    write_hf(tmp_path / "longer", "llama", vocab_size=64)
    assert kinds(console, models / "llama", tmp_path / "longer")["padding"] == ["embed.weight", "head.weight"]


def test_tie(console: Console, models: Path, tmp_path: Path) -> None:
    """The same weights once tied, once with the head written out: that they are not one model is told, and no more."""
    untied = Path(shutil.copytree(models / "tied", tmp_path / "untied"))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    edit_hf(untied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert kinds(console, models / "tied", untied) == {"tie": ["head.weight"]}
    edit_hf(untied, lambda t: bump(t, "lm_head.weight", 0, 0))
    assert kinds(console, untied, models / "tied") == {"tie": ["head.weight"], "values": ["head.weight"]}


def test_replica(console: Console, models: Path, copy: Copy) -> None:
    """A norm is on every tensor rank; the copy that differs is told with the side, the rank and the index."""
    other = copy("m22")
    name = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    edit_rank(other, "01_000", lambda saved: bump(saved["model"], name, 7))
    ran = console("verify", models / "llama", other, code=1)
    (line,) = [line for line in ran.out.splitlines() if line.startswith("replica: ")]
    assert name in line
    assert "B: mp_rank_01_000" in line
    assert "[7]" in line


def test_usage_errors_are_2(console: Console, models: Path) -> None:
    a = models / "llama"
    console("verify", a, code=2)
    console("verify", a, a, "--loader", "nonsense", code=2)
    assert "--loader.config" in console("verify", a, a, "--loader.colour", "red", code=2).err
    console("verify", a, a, "--saver.experts", "grouped", code=2)


@pytest.mark.parametrize("damage", ["absent", "truncated", "incomplete"])
def test_what_cannot_be_compared_is_3(console: Console, models: Path, copy: Copy, damage: str) -> None:
    other = copy("llama")
    weights = other / "model.safetensors"
    if damage == "absent":
        shutil.rmtree(other)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        edit_hf(other, lambda t: t.pop("model.norm.weight"))
    ran = console("verify", models / "llama", other, code=3)
    assert ran.out == ""
    assert "could not compare" in ran.err
    assert "llama" in ran.err or "norm" in ran.err
    told = console("verify", models / "llama", other, "--json", code=3)
    assert json.loads(told.out)["same"] is None
    assert json.loads(told.out)["problem"] in told.err


def stripped(folder: Path) -> None:
    """A Megatron folder without a word of its architecture."""
    shutil.rmtree(folder / "hf")

    def bare(saved: dict[str, Any]) -> None:
        del saved["args"]

    for name in ("00_000", "00_001", "01_000", "01_001"):
        edit_rank(folder, name, bare)


def test_each_side_may_have_options_of_its_own(console: Console, models: Path, copy: Copy) -> None:
    bare = copy("m22")
    stripped(bare)
    assert "--loader.config" in console("verify", models / "llama", bare, code=3).err
    console("verify", models / "llama", bare, "--loader-b", "mcore", "--loader-b.config", models / "llama")
    console("verify", bare, models / "llama", f"--loader-a.config={models / 'llama'}")
    console("verify", bare, models / "llama", "--loader.config", models / "llama")


def test_training_state_does_not_hinder(console: Console, models: Path, copy: Copy) -> None:
    trained = copy("m22")
    edit_rank(trained, "00_000", lambda saved: saved.update({"optimizer": {"state": {0: torch.zeros(3)}}}))
    console("verify", models / "llama", trained)


def test_drop_leaves_out_on_both_sides(console: Console, models: Path, copy: Copy) -> None:
    other = copy("llama")
    edit_hf(other, lambda t: bump(t, "model.norm.weight", 0))
    console("verify", models / "llama", other, code=1)
    console("verify", models / "llama", other, "--drop", "model.norm.*")


def test_check_reads_the_manifest(console: Console, models: Path, copy: Copy) -> None:
    """safetensors files carry no checksums; the ckptconv.json beside them does."""
    other = copy("m22", "back")
    shutil.rmtree(other)
    ckptconv.convert(models / "m22", other, saver="hf")
    console("verify", other, other, "--check")
    edit_hf(other, lambda t: bump(t, "model.norm.weight", 0))
    console("verify", other, other)
    ran = console("verify", other, other, "--check", code=3)
    assert "model.norm.weight is not the one that was written" in ran.err


def test_optimizer_state_is_compared_where_both_have_it(console: Console, tmp_path: Path) -> None:
    """Of a checkpoint that Megatron-Core wrote, as rank files: the same; with one moment and one setting changed: both told."""
    import torch

    golden = Path(__file__).parent.parent / "golden/optim/mcore0.12-flattened"
    ours, weights = tmp_path / "ranks", tmp_path / "weights"
    console("convert", golden, ours, "--saver", "mcore", "--tp", "1", "--saver.distributed-optimizer", "false")
    console("convert", golden, weights, "--saver", "mcore", "--optimizer", "drop")
    assert kinds(console, golden, ours) == {}
    ran = console("verify", golden, weights)
    assert "only A has it" in ran.err
    (file,) = ours.rglob("model_optim_rng.pt")
    saved = torch.load(file, weights_only=False)
    state = saved["optimizer"].get("optimizer", saved["optimizer"])
    state["state"][0]["exp_avg"][0] += 1
    for group in state["param_groups"]:
        group["eps"] = 0.5
    torch.save(saved, file)
    found = kinds(console, golden, ours)
    assert found.keys() == {"values", "state"}
    assert [name for name in found["values"] if name.endswith("[exp_avg]")] == found["values"]
    assert found["state"] == ["groups"]
