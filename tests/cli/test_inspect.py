"""`ckptconv inspect`: what it says of healthy checkpoints, from headers alone, and what it can still say of broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptconv.testing.workbench import bytes_read
from tests.cli.helpers.console import Console, bump, edit_hf, edit_rank, hollow, rank_file

Copy = Callable[..., Path]
KEYS = {
    "format", "mapping", "form", "family", "step", "layout", "architecture", "ranks", "state", "notes", "parameters",
    "replicas_to_check", "ignored", "problem",
}  # fmt: skip


def facts(console: Console, path: Path, *more: str, code: int = 0) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(console("inspect", path, "--json", *more, code=code).out)
    return read


def test_hugging_face(console: Console, models: Path) -> None:
    ran = console("inspect", models / "llama")
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[:4] == ["format: hf", "mapping: hf-llama", "family: hf-llama", "parameters: 41056"]
    assert "layers=4, hidden=32, heads=8, kv_heads=4, head_dim=6, ffn=48" in ran.out
    assert "rope=(base=500000.0 percent=1.0)" in ran.out
    assert "layers 0-3, 39 tensors, 82.11 kB, bf16  " in lines[-1]


def test_megatron_says_what_each_rank_holds(console: Console, models: Path) -> None:
    told = facts(console, models / "m22")
    assert set(told) == KEYS
    assert told["problem"] is None
    assert told["layout"] == {"tp": 2, "pp": 2, "vpp": 1, "ep": 1, "etp": 2}
    assert told["parameters"] == 41056, "rows that pad the vocabulary are no parameters"
    assert (told["step"], told["form"], told["family"]) == (1, [], "hf-llama"), (
        "a model without experts has them in no form"
    )
    assert facts(console, models / "moe")["form"] == ["experts_te"]
    assert told["architecture"]["dtype"] == "bf16", "nothing but the weights tells it"
    assert [(r["place"], r["layers"]) for r in told["ranks"]] == [
        ("mp_rank_00_000", [0, 1]), ("mp_rank_01_000", [0, 1]), ("mp_rank_00_001", [2, 3]), ("mp_rank_01_001", [2, 3]),
    ]  # fmt: skip
    text = console("inspect", models / "m22").out
    assert "layout: tp=2 pp=2 vpp=1 ep=1 etp=2" in text
    assert "pp=1 tp=0 ep=0 vpp=0 etp=0: layers 2-3, 14 tensors" in text


def test_tensors_are_listed_by_stored_name(console: Console, models: Path) -> None:
    out = console("inspect", models / "m22", "--tensors", "*linear_proj*").out
    assert out.count("linear_proj.weight  bf16 [32, 24]") == 8
    assert "linear_fc1" not in out
    rows = facts(console, models / "llama", "--tensors", "lm_head*")["ranks"]
    assert rows[0]["listed"] == {"lm_head.weight": "bf16 [61, 32]"}


def test_tensors_are_not_read(console: Console, copy: Copy) -> None:
    """The same answer when every weight is a hole; and no more is read than headers take."""
    folder = copy("llama")
    whole = facts(console, folder)
    hollow(folder)
    before = bytes_read()
    assert facts(console, folder) == whole
    assert bytes_read() - before < 40_000


def test_iteration_folder_and_choice(console: Console, copy: Copy) -> None:
    base = copy("m22")
    shutil.copytree(base / "iter_0000001", base / "release")
    assert facts(console, base)["step"] == 1
    assert facts(console, base, "--iteration", "release")["step"] == "release"
    assert facts(console, base / "iter_0000001")["step"] == 1
    console("inspect", base, "--iteration", "soon", code=2)
    console("inspect", base, "--iteration", "7", code=1)


def test_training_state_is_told(console: Console, copy: Copy) -> None:
    trained = copy("m22")
    edit_rank(trained, "00_000", lambda saved: saved.update({"optimizer": {}, "rng_state": [{}]}))
    out = console("inspect", trained).out
    assert "state: optimizer" in out
    assert "state: RNG state" in out


def test_missing_tensor_fails_after_all_else_is_said(console: Console, copy: Copy) -> None:
    folder = copy("llama")
    edit_hf(folder, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    ran = console("inspect", folder, code=1)
    assert "format: hf" in ran.out
    assert "38 tensors" in ran.out
    assert "missing: model.layers.1.self_attn.q_proj.weight" in ran.err
    told = facts(console, folder, code=1)
    assert told["ranks"][0]["tensors"] == 38
    assert "q_proj" in told["problem"]


def test_truncated_file_is_told_file_by_file(console: Console, copy: Copy) -> None:
    folder = copy("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ran = console("inspect", folder, code=1)
    assert "config.json" in ran.out
    (line,) = [line for line in ran.out.splitlines() if "model.safetensors" in line]
    assert "problem" in line
    assert ran.err.startswith("ckptconv: error: ")


def test_missing_rank(console: Console, copy: Copy) -> None:
    folder = copy("m22")
    shutil.rmtree(rank_file(folder, "01_001").parent)
    ran = console("inspect", folder, code=1)
    assert ran.out.count("model_optim_rng.pt") == 3
    told = facts(console, folder, code=1)
    assert sum(row["file"].endswith(".pt") and row.get("readable", False) for row in told["files"]) == 3
    assert told["problem"]


def test_damaged_pickle_leaves_the_other_ranks_readable(console: Console, copy: Copy) -> None:
    folder = copy("m22")
    path = rank_file(folder, "00_001")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = facts(console, folder, code=1)
    problems = [row["file"] for row in told["files"] if "problem" in row]
    assert problems == ["iter_0000001/mp_rank_00_001/model_optim_rng.pt"]


def test_unknown_model_type_names_the_known_ones(console: Console, copy: Copy) -> None:
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
    ran = console("inspect", folder, code=1)
    assert "model.safetensors  " in ran.out
    assert "mixtral (hf-mixtral)" in ran.err
    console("inspect", folder, "--family", "llama")
    assert "known" in console("inspect", folder, "--family", "novel", code=2).err


@pytest.mark.parametrize("place", ["absent", "empty", "file"])
def test_nothing_there(console: Console, tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    if place == "empty":
        path.mkdir()
    elif place == "file":
        path.write_text("text")
    ran = console("inspect", path, code=1)
    assert str(path) in ran.err
    assert "Traceback" not in ran.err


def test_check_reads_payloads_where_there_are_checksums(console: Console, copy: Copy) -> None:
    folder = copy("llama")
    edit_hf(folder, lambda t: bump(t, "model.norm.weight", 0))
    console("inspect", folder, "--check")
    ranks = copy("m22")
    path = rank_file(ranks, "00_000")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    console("inspect", ranks)
    ran = console("inspect", ranks, "--check", code=1)
    assert "mp_rank_00_000" in ran.err


def test_options_of_a_saver_are_a_usage_error(console: Console, models: Path) -> None:
    ran = console("inspect", models / "llama", "--saver.template", "x", code=2)
    assert "inspect takes --loader.X alone" in ran.err
    assert ran.out == ""
    ran = console("inspect", models / "llama", "--loader.colour", "red", code=2)
    assert "it has: --loader.config" in ran.err
    assert ran.out == ""
