"""Checkpoints of NeMo's training. The weights are those of NeMo's own archives, or cut by torch's FSDP; the dictionary around them
is made here in the shape that Lightning gives it (tests/golden/nemo/lightning has a real one)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ckptconv.compare import verify
from ckptconv.containers import torch_file, torch_sharded
from ckptconv.containers.pickled import Global, Known, Opaque
from ckptconv.dtypes import FP32
from ckptconv.errors import FormatError, PlanError, UsageError
from ckptconv.leaves import full
from ckptconv.nemo import lightning, model_config, omegaconf
from ckptconv.nemo.run_state import RunState, run_state
from ckptconv.pipeline import Job, load
from ckptconv.registry import sniff
from tests.unit.helpers.nemo import extracted, nemo
from tools.golden_cases import convert

GOLDEN = Path(__file__).parents[1] / "golden" / "nemo"
FSDP = Path(__file__).parent / "fsdp.py"
NAME = "megatron_gpt--step=3-last.ckpt"
RUN: dict[str, Any] = {
    "epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.4.0", "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {},
    "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4}]}], "lr_schedulers": [{"last_epoch": 3}], "hparams_name": "cfg",
}  # fmt: skip


def wrapped(weights: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A file of NeMo's as Lightning would save it."""
    return {**RUN, "state_dict": torch.load(weights, weights_only=False), "hyper_parameters": {"cfg": config}}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "model_config.yaml").read_text()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(The folder of a training run's rank files, the archive of the same weights that NeMo wrote.)"""
    home = tmp_path_factory.mktemp("ranks")
    archive = nemo("legacy_mha_tp2pp2", home)
    folder = extracted(archive, home / "unpacked")
    out = home / "checkpoints"
    for weights in folder.glob("*/model_weights.ckpt"):
        (out / weights.parent.name).mkdir(parents=True)
        torch.save(wrapped(weights, config_of(folder)), out / weights.parent.name / NAME)
    return out, archive


def test_rank_files_are_found_from_one_of_them(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, archive = trained
    one = folder / "tp_rank_01_pp_rank_000" / NAME
    for path in (one, folder):
        assert sniff(path).name == "lightning"
        assert verify(Job(path), archive).same
    with pytest.raises(PlanError, match=r"optimizer(.|\n)*learning rate scheduler(.|\n)*--optimizer drop"):
        convert(one, tmp_path / "no", saver="nemo", tp=1)
    convert(one, tmp_path / "out.nemo", saver="nemo", tp=1, optimizer="drop")
    assert verify(archive, tmp_path / "out.nemo").same
    with pytest.raises(UsageError, match="lightning is only read"):
        convert(archive, tmp_path / "no", saver="lightning")


def interleaved(saved: list[dict[str, Any]], config: dict[str, Any], pp: int, key: str) -> dict[str, Any]:
    """What stage `pp` of two saves of the same four layers in two chunks each: `saved` are both stages' weights, without interleaving."""
    chunks: dict[str, Any] = {}
    for v in (0, 1):
        layer = v * 2 + pp  # of the model; a chunk has one, and counts from 0
        chunk = chunks[key.format(v)] = {}
        for name, value in saved[layer // 2].items():
            inner = name.removeprefix("model.")
            if f".layers.{layer % 2}." in inner:
                chunk[inner.replace(f".layers.{layer % 2}.", ".layers.0.")] = value
            elif ".layers." not in inner and (layer == (0 if "embedding" in inner else 3) or "rotary" in inner):
                chunk[inner] = value
    config = {**config, "virtual_pipeline_model_parallel_size": 2}
    return {
        **RUN,
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "state_dict": {},
        **chunks,
        "hyper_parameters": {"cfg": config},
    }


@pytest.mark.parametrize("key", ["model{}", "model_{}"])
def test_chunks_of_an_interleaved_pipeline(key: str, tmp_path: Path) -> None:
    archive = nemo("legacy_mha_tp2pp2", tmp_path)
    folder = extracted(archive, tmp_path / "unpacked")
    for tp in (0, 1):
        stages = [folder / f"tp_rank_{tp:02d}_pp_rank_{pp:03d}" for pp in (0, 1)]
        saved = [torch.load(stage / "model_weights.ckpt", weights_only=False) for stage in stages]
        for pp, stage in enumerate(stages):
            (tmp_path / "run" / stage.name).mkdir(parents=True)
            torch.save(interleaved(saved, config_of(folder), pp, key), tmp_path / "run" / stage.name / NAME)
    found = load(tmp_path / "run")
    assert not any("left behind" in note for note in found.extras.notes)
    assert verify(Job(tmp_path / "run"), archive).same
    convert(tmp_path / "run", tmp_path / "out.nemo", saver="nemo", tp=1, pp=1)
    assert verify(archive, tmp_path / "out.nemo").same


def test_a_configuration_of_omegaconf_is_read_as_the_yaml_it_was_made_of() -> None:
    """References to other keys are followed."""
    saved = torch_file.read(GOLDEN / "lightning" / "trained.ckpt", calls=omegaconf.CALLS)
    assert isinstance(saved, dict)
    found = lightning.configuration(saved, "golden")
    assert found is not None
    text = (GOLDEN / "configs" / "legacy_mha_tp2.yaml").read_bytes()
    assert found.raw == model_config.read(text, "yaml").raw
    assert run_state(saved, "golden") == RunState(
        1, ("optimizer", "learning rate scheduler", "progress of the loops"), ()
    )


def test_a_distributed_folder(tmp_path: Path) -> None:
    """NeMo's own tensors, beside a dictionary of Lightning. Its kind has to be named: Megatron-Core's look alike."""
    archive = nemo("mcore_mha_fp16_torchdist", tmp_path)
    folder = extracted(archive, tmp_path / "unpacked")
    weights = folder / "model_weights"
    hyper = {"cfg": config_of(folder)}
    torch.save({**RUN, "state_dict": {}, "hyper_parameters": hyper}, weights / "common.pt")
    job = Job(weights, loader="lightning")
    assert verify(job, archive).same
    with pytest.raises(PlanError, match="--optimizer drop"):
        convert(weights, tmp_path / "no", loader="lightning", saver="nemo2")
    convert(weights, tmp_path / "out", loader="lightning", saver="nemo2", optimizer="drop")
    assert verify(archive, tmp_path / "out").same
    (tmp_path / "unpacked" / "model_weights-unfinished").touch()
    with pytest.raises(FormatError, match="model_weights-unfinished lies beside it"):
        verify(job, archive)


@pytest.fixture(scope="module")
def sharded(hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """sharded(KIND) -> (shards of two processes, the Hugging Face folder of the same model)."""
    home = tmp_path_factory.mktemp("fsdp")
    source = hf("llama")
    options = {"transformer_impl": "local", "weights": "ranks", "pack": False}
    convert(source, home / "nemo", saver="nemo", saver_options=options)
    saved = wrapped(home / "nemo" / "model_weights.ckpt", config_of(home / "nemo"))
    weights = {name: value for name, value in saved["state_dict"].items() if isinstance(value, torch.Tensor)}
    torch.save({**saved, "state_dict": weights}, home / "whole.pt")

    def get(kind: str) -> tuple[Path, Path]:
        if not (home / kind).exists():
            command = [sys.executable, FSDP, home / "whole.pt", home / kind, kind, "2"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        return home / kind, source

    return get


@pytest.mark.parametrize("kind", ["sharded", "dtensor"])
def test_shards_of_fsdp_are_put_together(
    kind: str, sharded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Flat parameters cut anywhere, as torch tells them: row by row of each parameter, unevenly."""
    folder, source = sharded(kind)
    assert sniff(folder).name == "lightning"
    assert verify(Job(folder), source).same
    convert(folder, tmp_path / "out", saver="mcore", tp=2, optimizer="drop")
    assert verify(source, tmp_path / "out").same
    state = torch_file.read(folder / "fsdp_shard_00001" / "last.ckpt")
    assert isinstance(state, dict)
    parts = [torch_sharded.part(value, name) for name, value in state["state_dict"].items()]
    assert any(part is not None and (part.axis == 0) == (kind == "dtensor") for part in parts)


def test_missing_files_are_told(
    trained: tuple[Path, Path], sharded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    ranks = Path(shutil.copytree(trained[0], tmp_path / "ranks"))
    (ranks / "tp_rank_01_pp_rank_000" / NAME).rename(ranks / "tp_rank_01_pp_rank_000" / "other.ckpt")
    with pytest.raises(FormatError, match=r"expected one checkpoint .* found megatron_gpt.*, other\.ckpt"):
        verify(Job(ranks), trained[1])
    with pytest.raises(FormatError, match="is missing in tp_rank_01_pp_rank_000"):
        verify(Job(ranks / "tp_rank_00_pp_rank_000" / NAME), trained[1])
    (ranks / f"{NAME.removesuffix('.ckpt')}-unfinished").touch()
    with pytest.raises(FormatError, match="was not saved to its end"):
        verify(Job(ranks / "tp_rank_00_pp_rank_000" / NAME), trained[1])
    shards = Path(shutil.copytree(sharded("sharded")[0], tmp_path / "shards"))
    shutil.rmtree(shards / "fsdp_shard_00000")
    with pytest.raises(FormatError, match=r"FSDP shards \[1\]: some are missing"):
        verify(Job(shards), trained[1])


@pytest.mark.parametrize("kind", ["sharded", "dtensor"])
def test_parts_that_do_not_make_the_whole_are_told(
    kind: str, sharded: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The second process's file is the first's once more."""
    folder = Path(shutil.copytree(sharded(kind)[0], tmp_path / "twice"))
    shutil.copy(folder / "fsdp_shard_00000" / "last.ckpt", folder / "fsdp_shard_00001" / "last.ckpt")
    with pytest.raises(FormatError, match=r"the pieces of 2 processes do not make"):
        verify(Job(folder), folder)


def test_wrapped_tensors_of_other_kinds_are_refused() -> None:
    def wrapped_as(cls: str, state: object) -> Opaque:
        call = Global("torch._utils", "_rebuild_wrapper_subclass")
        module, _, name = cls.rpartition(".")
        return Opaque(
            "torch._tensor", "_rebuild_from_type_v2", (call, Global(module, name), (None, None, (4, 2)), state)
        )

    spec = Opaque("torch.distributed.tensor._dtensor_spec", "DTensorSpec")
    local = full((2, 2), FP32, 0)
    for placements, message in (
        ((Opaque("torch.distributed.tensor.placement_types", "Partial"),), "known are Shard and Replicate"),
        ((Opaque("x", "Shard", state={"dim": 0}), Opaque("x", "Shard", state={"dim": 1})), r"cut along axes \[0, 1\]"),
        ((Opaque("x", "Shard", state={"dim": 7}),), r"cut along axes \[7\]"),
        (None, "a DTensor of a form that is not known"),
    ):
        spec.state = {"placements": placements}
        with pytest.raises(FormatError, match=message):
            torch_sharded.part(
                wrapped_as("torch.distributed.tensor.DTensor", {"_local_tensor": local, "_spec": spec}), "w"
            )
    with pytest.raises(FormatError, match="a ShardedTensor of a form that is not known"):
        torch_sharded.part(wrapped_as("torch.distributed._shard.sharded_tensor.api.ShardedTensor", ([local],)), "w")
    assert torch_sharded.part(wrapped_as("somewhere.Else", {}), "w") is None


def test_a_configuration_that_holds_itself_is_refused() -> None:
    table = Known(Global("omegaconf.dictconfig", "DictConfig"), {})
    table.state = {"_content": {"again": table}}
    with pytest.raises(FormatError, match="nests over 40 deep"):
        omegaconf.plain(table, "x")
