"""Plain checkpoints of torch.distributed.checkpoint, made by torch from models of transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp
from transformers import AutoModelForCausalLM

import ckptconv
from ckptconv.compare import verify
from ckptconv.errors import CkptconvError, ConfigError, CoverageError, FormatError, PlanError, UsageError
from ckptconv.inspection import inspect
from ckptconv.pipeline import Job
from ckptconv.registry import sniff

FSDP = Path(__file__).parent / "helpers" / "fsdp.py"
Weights = dict[str, torch.Tensor]
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def weights_of(folder: Path) -> Weights:
    """Names and tensors of a model in memory, which is what training runs save."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def save(state: dict[str, Any], folder: Path) -> Path:
    save_dcp(state, checkpoint_id=folder, no_dist=True)
    return folder


def nested(weights: Weights, words: str) -> dict[str, Any]:
    """A state dict with the weights below `words`: "a.b" puts them into {"a": {"b": ...}}."""
    state: dict[str, Any] = dict(weights)
    for word in reversed(words.split(".") if words else []):
        state = {word: state}
    return state


def same_as(folder: Path, hf: Path, out: Path, **wishes: Any) -> None:
    """Converted to Hugging Face it is bit for bit what transformers saved."""
    ckptconv.convert(folder, out, saver="hf", loader_options={"config": str(hf)}, **wishes)
    made, true = (
        {n: t for path in sorted(f.glob("*.safetensors")) for n, t in load_file(path).items()} for f in (out, hf)
    )
    assert made.keys() == true.keys()
    for name, tensor in true.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name


@pytest.fixture(scope="session")
def trained(hf_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and its AdamW, saved by two processes under FSDP2."""
    out = tmp_path_factory.mktemp("fsdp") / "step-3"
    command = [sys.executable, FSDP, hf_folders["Llama"], out, "2"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out


@ALONE
@pytest.mark.parametrize("prefix", ["", "model", "module", "state_dict.model"])
def test_names_of_transformers_come_back_bit_for_bit(hf_folders: dict[str, Path], tmp_path: Path, prefix: str) -> None:
    folder = save(nested(weights_of(hf_folders["Llama"]), prefix), tmp_path / "ckpt")
    assert sniff(folder).name == "dcp"
    same_as(folder, hf_folders["Llama"], tmp_path / "out")


@ALONE
@pytest.mark.parametrize("name", ["Llama-tied", "Qwen2", "Qwen3", "fused"])
def test_other_families(hf_folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """With experts, biases, and heads that are the embedding (which the state dict holds a second time)."""
    folder = save({"model": weights_of(hf_folders[name])}, tmp_path / "ckpt")
    assert verify(Job(folder, loader_options={"config": str(hf_folders[name])}), hf_folders[name]).same


def test_training_run_under_fsdp(hf_folders: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    """Parameters in shards of two processes; 61 rows give 31 and 30. The optimizer is lost only when that is said."""
    config = {"config": str(hf_folders["Llama"])}
    with pytest.raises(PlanError, match=r"optim \(\d+ entries\)(.|\n)*steps \(1 entry\)(.|\n)*--optimizer drop"):
        ckptconv.convert(trained, tmp_path / "no", saver="hf", loader_options=config)
    same_as(trained, hf_folders["Llama"], tmp_path / "out", optimizer="drop")
    ckptconv.convert(trained, tmp_path / "ranks", saver="mcore", tp=2, loader_options=config, optimizer="drop")
    assert verify(hf_folders["Llama"], tmp_path / "ranks").same
    assert verify(Job(trained, loader_options=config), tmp_path / "ranks").same


def test_inspect_tells_chunks_and_what_lies_where(hf_folders: dict[str, Path], trained: Path) -> None:
    facts, problem = inspect(Job(trained, loader_options={"config": str(hf_folders["Llama"])}))
    assert problem is None
    storage: Any = facts["storage"]
    rows = {row["name"]: row for row in storage["tensors"]}
    embedding = rows["model.model.embed_tokens.weight"]
    assert embedding == {
        "name": "model.model.embed_tokens.weight", "dtype": "fp32", "shape": [61, 32], "chunks": 2, "grid": [2, 1], "chunk": [31, 32]
    }  # fmt: skip
    told = FileSystemReader(trained).read_metadata()
    assert {n: row["chunks"] for n, row in rows.items()} == {
        n: len(entry.chunks)
        for n, entry in told.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    for row in storage["files"]:
        held = [index for index, info in told.storage_data.items() if info.relative_path == row["file"]]
        assert row["chunks"] + row["objects"] == len(held)
        assert row["bytes"] == (trained / row["file"]).stat().st_size
    assert storage["unused"] == storage["problems"] == []


@ALONE
def test_config_beside_is_found_and_side_files_travel(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save(weights_of(hf_folders["Llama"]), tmp_path / "ckpt")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(hf_folders["Llama"] / name, folder)
    ckptconv.convert(folder, tmp_path / "out", saver="hf")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf_folders["Llama"] / name).read_bytes()
    facts, _ = inspect(Job(folder))
    assert facts["storage"]["unused"] == []  # type: ignore[index]


@ALONE
def test_without_a_config_only_inspect_says_something(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save({"model": weights_of(hf_folders["Llama"])}, tmp_path / "ckpt")
    facts, problem = inspect(Job(folder))
    assert isinstance(problem, ConfigError)
    assert "--loader.config HF_DIR" in str(problem)
    assert len(facts["storage"]["tensors"]) == 21  # type: ignore[index]


@ALONE
def test_names_of_no_family_are_told(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save(
        {"tok_embeddings": {"weight": torch.ones(61, 32)}, "layers": {"0": {"wq": torch.ones(4, 4)}}}, tmp_path / "a"
    )
    facts, problem = inspect(Job(folder))
    assert "none of its 2 tensors has a Hugging Face name" in str(problem)
    assert "tok_embeddings.weight" in str(problem)
    assert "--mapping" in str(problem)
    assert [row["name"] for row in facts["storage"]["tensors"]] == ["tok_embeddings.weight", "layers.0.wq"]  # type: ignore[index]
    told = Job(folder, loader_options={"config": str(hf_folders["Llama"])})
    _, problem = inspect(told)
    assert isinstance(problem, CoverageError)
    assert sum(line.startswith("unexpected: ") for line in problem.problems) == 2
    with pytest.raises(CkptconvError):
        verify(told, told)


@ALONE
def test_mapping_file_for_other_names(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    mapping = tmp_path / "mine.toml"
    mapping.write_text(
        'extends = "hf-llama"\n[[block]]\n[block.tensors]\n"model.embed_tokens.weight" = false\n'
        '"tok_embeddings.weight" = "embed.weight"\n'
    )
    weights = weights_of(hf_folders["Llama"])
    weights["tok_embeddings.weight"] = weights.pop("model.embed_tokens.weight")
    folder = save({"net": weights}, tmp_path / "ckpt")
    config = {"config": str(hf_folders["Llama"])}
    told = Job(folder, loader_options=config, mapping=(mapping,), family="mine")
    assert verify(told, hf_folders["Llama"]).same
    with pytest.raises(CoverageError, match=r"unexpected: tok_embeddings\.weight"):
        ckptconv.convert(folder, tmp_path / "out", saver="mcore", loader_options=config)


@ALONE
def test_one_strange_name_among_the_models_is_an_error(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    weights = {**weights_of(hf_folders["Llama"]), "model.layers.0.self_attn.q_proj.lora_A": torch.ones(2)}
    folder = save({"model": weights}, tmp_path / "ckpt")
    with pytest.raises(CoverageError, match=r"unexpected: model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        same_as(folder, hf_folders["Llama"], tmp_path / "out")
    same_as(folder, hf_folders["Llama"], tmp_path / "out", drop=("*lora_A",))


@ALONE
def test_two_models_in_one_folder_are_chosen_by_prefix(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    """Averaged weights beside the last ones."""
    weights = weights_of(hf_folders["Llama"])
    averaged = {name: tensor * 0.5 for name, tensor in weights.items()}
    folder = save({"model": weights, "ema": averaged}, tmp_path / "ckpt")
    config = str(hf_folders["Llama"])
    with pytest.raises(FormatError, match=r"'model\.', 'ema\.': choose one with --loader\.prefix"):
        ckptconv.convert(folder, tmp_path / "no", saver="hf", loader_options={"config": config})
    options = {"config": config, "prefix": "ema."}
    ckptconv.convert(folder, tmp_path / "out", saver="hf", loader_options=options, optimizer="drop")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(made["model.norm.weight"], averaged["model.norm.weight"])
    with pytest.raises(CkptconvError, match="holds only 0 tensors"):
        ckptconv.load(folder, loader_options={**options, "prefix": "nothing."})


@ALONE
def test_iterations_as_megatron_numbers_them(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    """fsdp_dtensor lies in iter_XXXXXXX, and nothing of Megatron-Core's beside `.metadata`."""
    base = tmp_path / "base"
    for step in (1, 2):
        save(nested(weights_of(hf_folders["Llama"]), "model"), base / f"iter_000000{step}")
    (base / "latest_checkpointed_iteration.txt").write_text("2")
    assert sniff(base).name == "dcp"
    config = {"config": str(hf_folders["Llama"])}
    assert ckptconv.load(base, loader_options=config).extras.step == 2
    assert ckptconv.load(base, loader_options=config, iteration=1).extras.step == 1


@ALONE
def test_folders_of_megatron_core_are_not_taken(hf_folders: dict[str, Path], tmp_path: Path) -> None:
    ckptconv.convert(hf_folders["Llama"], tmp_path / "dist", saver="mcore-dist")
    assert sniff(tmp_path / "dist").name == "mcore-dist"
    (folder,) = (tmp_path / "dist").glob("iter_*")
    (folder / "metadata.json").unlink()
    assert sniff(tmp_path / "dist").name == "mcore-dist", "common.pt is Megatron-Core's"
    (folder / "common.pt").unlink()
    assert sniff(tmp_path / "dist").name == "dcp"


def test_saving_is_refused(hf_folders: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    config = {"config": str(hf_folders["Llama"])}
    with pytest.raises(UsageError, match="dcp is only read"):
        ckptconv.convert(hf_folders["Llama"], tmp_path / "out", saver="dcp")
    with pytest.raises(UsageError, match="dcp is only read"):
        ckptconv.convert(trained, tmp_path / "out", loader_options=config, optimizer="drop")
    with pytest.raises(UsageError, match=r"no option --saver\.files"):
        ckptconv.convert(hf_folders["Llama"], tmp_path / "out", saver="dcp", saver_options={"files": 2})
    assert not (tmp_path / "out").exists()


@ALONE
def test_config_of_a_larger_model_is_refused_at_once(hf_copy: Callable[[str], Path], tmp_path: Path) -> None:
    hf = hf_copy("Llama")
    folder = save(weights_of(hf), tmp_path / "ckpt")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8192}))
    with pytest.raises(ConfigError, match="8192 layers, but"):
        ckptconv.load(folder, loader_options={"config": str(hf)})


def test_damage_is_told_and_what_is_sound_shown(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "broken"))
    (folder / "__1_0.distcp").unlink()
    (folder / "__9_0.distcp").write_bytes(b"left over")
    facts, problem = inspect(Job(folder))
    storage: Any = facts["storage"]
    assert "__1_0.distcp" in str(problem)
    files = {row["file"]: row for row in storage["files"]}
    assert files["__1_0.distcp"]["bytes"] is None
    assert files["__1_0.distcp"]["chunks"] > 60
    assert storage["unused"] == [{"file": "__9_0.distcp", "start": 0, "bytes": 9}]
    assert len(storage["problems"]) == 1
