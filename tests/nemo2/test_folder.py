"""NeMo 2 folders as users have them: NeMo's own context beside weights, old and damaged ones, and what travels along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import ckptconv
from ckptconv.compare import verify
from ckptconv.errors import CkptconvError, ConfigError, FormatError, TopologyError
from ckptconv.inspection import inspect
from ckptconv.pipeline import Job
from ckptconv.registry import sniff
from tools.golden_cases import convert

CONTEXTS = Path(__file__).parents[1] / "golden" / "nemo" / "nemo2"


@pytest.fixture(scope="module")
def made(hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nemo2") / "ours"
    convert(hf("llama"), out, saver="nemo2", saver_options={"transformer_impl": "local"})
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """One that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "ckpt"))


@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "llama-head-dim", "llama3", "qwen2", "qwen3", "mistral", "mixtral"]
)
def test_families_there_and_back(kind: str, hf: Callable[..., Path], tmp_path: Path) -> None:
    """The tensors, and the architecture, said again in full by the context."""
    source = hf(kind)
    convert(source, tmp_path / "ours", saver="nemo2")
    assert sniff(tmp_path / "ours").name == "nemo2"
    assert verify(source, tmp_path / "ours").same
    ours, theirs = (ckptconv.load(path).config for path in (tmp_path / "ours", source))
    for name in ("family", "layers", "heads", "kv_heads", "head_dim", "ffn", "tied", "rope", "norm_eps", "activation", "qkv_bias",
                 "qk_norm", "experts", "moe_layers", "router_topk", "sliding_window", "max_positions", "vocab", "dtype"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


def test_the_oldest_layout_has_no_subfolders(folder: Path, hf: Callable[..., Path]) -> None:
    for part in ("weights", "context"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
    assert verify(Job(folder, loader="nemo2"), hf("llama")).same
    with pytest.raises(FormatError, match="it looks like mcore-dist and nemo2; say which with --loader"):
        ckptconv.load(folder)


def test_io_json_is_enough(folder: Path, hf: Callable[..., Path]) -> None:
    (folder / "context" / "model.yaml").unlink()
    assert verify(folder, hf("llama")).same


def test_nemos_own_description_of_another_model_is_seen(folder: Path) -> None:
    shutil.copy(CONTEXTS / "llama_spm" / "model.yaml", folder / "context")
    with pytest.raises(ConfigError, match="contradicts the tensors"):
        ckptconv.load(folder)


def test_without_a_context_a_config_is_needed(folder: Path, hf: Callable[..., Path]) -> None:
    shutil.rmtree(folder / "context")
    with pytest.raises(ConfigError, match=r"neither context/model\.yaml nor io\.json.*--loader\.config"):
        ckptconv.load(folder, loader="nemo2")
    assert verify(Job(folder, loader="nemo2", loader_options={"config": str(hf("llama"))}), hf("llama")).same


def test_adapters_and_unfinished_folders_are_refused(folder: Path) -> None:
    folder.with_name("ckpt-unfinished").touch()
    with pytest.raises(FormatError, match="ckpt-unfinished lies beside it"):
        ckptconv.load(folder)
    folder.with_name("ckpt-unfinished").unlink()
    (folder / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": "/base/model"}))
    with pytest.raises(FormatError, match=r"holds adapters .* of '/base/model' and no model"):
        ckptconv.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.yaml", "config: !!python/object/apply:os.system [x]", "tag"),
        ("model.yaml", "config: [1]", "config is a list, expected a table"),
        ("model.yaml", "a: &a [x]\nconfig: {_target_: *a, x: *b}", "alias"),
        ("model.yaml", "", "is empty"),
        ("io.json", "{", "not valid JSON"),
        (
            "io.json",
            '{"root": {"type": "pyref", "module": "os", "name": "system"}, "objects": {}}',
            "model is a NoneType",
        ),
    ],
)
def test_damaged_contexts_are_one_clear_error(file: str, content: str, message: str, folder: Path) -> None:
    (folder / "context" / "model.yaml").unlink()
    (folder / "context" / file).write_text(content)
    with pytest.raises(CkptconvError, match=message):
        ckptconv.load(folder)


@pytest.mark.parametrize("key", ["model_path", "pretrained_model_name"])
@pytest.mark.parametrize("form", ["absolute", "above"])
def test_a_tokenizer_elsewhere_is_not_taken(key: str, form: str, folder: Path) -> None:
    place = folder / ("tokenizer.model" if key == "model_path" else "elsewhere")
    if key == "model_path":
        place.write_bytes(b"")
    else:
        place.mkdir()
        (place / "tokenizer.json").write_text("{}")
    path = folder / "context" / "model.yaml"
    said = yaml.safe_load(path.read_text())
    name = str(place) if form == "absolute" else f"../{place.name}"
    path.write_text(yaml.safe_dump({**said, "tokenizer": {"_target_": "x", key: name}}))
    assert ckptconv.load(folder).extras.files == {}


def test_a_layout_is_refused_and_inspect_tells_chunks(folder: Path, hf: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="no --tp"):
        convert(hf("llama"), tmp_path / "no", saver="nemo2", tp=2)
    facts, problem = inspect(Job(folder))
    assert problem is None
    rows = {row["name"] for row in facts["storage"]["tensors"]}  # type: ignore[index]
    assert "module.embedding.word_embeddings.weight" in rows
    assert facts["storage"]["problems"] == facts["storage"]["unused"] == []  # type: ignore[index]
