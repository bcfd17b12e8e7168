"""`ckptconv upgrade` on the command line: what it says, what it asks for, and the file it adds for Megatron-Bridge."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.cli.helpers.console import Console

GOLDEN = Path(__file__).parent.parent / "golden"
ZARR = GOLDEN / "mcore/zarr_mcore0.12.0_llama_bf16_tp2pp2"
HF = ("--loader.config", str(ZARR / "hf"), "--vocab-size", "160")


def test_what_changes_is_said_before_anything_is_written(console: Console, tmp_path: Path) -> None:
    ran = console("upgrade", ZARR / "ckpt", tmp_path / "new", *HF)
    assert ran.code == 0
    assert (
        "format: Megatron-Core, distributed (zarr) -> Megatron-Core, distributed (torch_dist, layers stacked)"
        in ran.err
    )
    assert "--ckpt-format torch_dist" in ran.out
    assert console("verify", ZARR / "hf", tmp_path / "new").code == 0


def test_a_dry_run_says_the_same_as_json(console: Console, tmp_path: Path) -> None:
    facts = json.loads(console("upgrade", ZARR / "ckpt", tmp_path / "new", *HF, "--dry-run", "--json").out)
    assert facts["changes"][0].startswith("format: Megatron-Core, distributed (zarr)")
    assert not (tmp_path / "new").exists()


def test_a_model_for_megatron_bridge_is_described_as_it_was_stored(console: Console, tmp_path: Path) -> None:
    options = ("--saver.run-config", "--saver.iteration", "3")
    assert console("upgrade", ZARR / "ckpt", tmp_path / "new", *HF, *options).code == 0
    said = yaml.safe_load((tmp_path / "new/iter_0000003/run_config.yaml").read_text())
    config = json.loads((ZARR / "hf/config.json").read_text())
    model = said["model"]
    assert model["_target_"].endswith(".GPTModelProvider")
    for ours, theirs in (
        ("num_layers", "num_hidden_layers"), ("num_query_groups", "num_key_value_heads"), ("ffn_hidden_size", "intermediate_size"),
    ):  # fmt: skip
        assert model[ours] == config[theirs]
    assert (model["bf16"], model["vocab_size"], model["should_pad_vocab"]) == (True, 256, False)
    assert model["activation_func"] == {"_target_": "torch.nn.functional.silu", "_call_": False}
    assert said["checkpoint"]["save_optim"] is False
