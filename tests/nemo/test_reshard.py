"""Archives moved through layouts, forms and packings: the model stays the same bit for bit, and so does the file where nothing differs."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ckptconv
from ckptconv import Job, prepare
from ckptconv.testing.checkpoints import write_hf
from tests.nemo.conftest import Archive, packed
from tests.unit.helpers.nemo import GZIPPED, PER_RANK, TORCH_DIST, contents, extracted
from tools.golden_cases import convert
from tools.golden_checks import hf_leaves
from tools.golden_nemo import archive_differences, loaded, members, padding, torch_dist

TOKENIZERS = Path(__file__).parents[1] / "golden" / "nemo" / "tokenizers"
LAYOUTS = ({"tp": 4, "pp": 1}, {"tp": 2, "pp": 2}, {"tp": 1, "pp": 4}, {"tp": 1, "pp": 1})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 392 tokens, whose padding is another for every number of tensor ranks."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    write_hf(folder, "llama", vocab_size=392, num_key_value_heads=8, num_hidden_layers=4)
    shutil.copy(TOKENIZERS / "output.model", folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "mcore"])
def test_a_round_of_layouts_ends_with_the_same_file(legacy: bool, source: Path, tmp_path: Path) -> None:
    options = {"mcore_gpt": str(not legacy).lower(), "weights": "ranks"}
    last = tmp_path / "0.nemo"
    convert(source, last, saver="nemo", saver_options=options)
    for i, layout in enumerate(LAYOUTS, 1):
        convert(last, tmp_path / f"{i}.nemo", tp=layout["tp"], pp=layout["pp"])
        last = tmp_path / f"{i}.nemo"
        assert padding(last, 392) == []
        assert sum(name.endswith("model_weights.ckpt") for name in members(last)) == layout["tp"] * layout["pp"]
    assert last.read_bytes() == (tmp_path / "0.nemo").read_bytes()


def test_stages_of_other_sizes_and_back_have_the_same_weights(source: Path, tmp_path: Path) -> None:
    """In the words that Megatron-Core has for a first and a last stage, which NeMo 2.3 and newer take from the file."""
    convert(source, tmp_path / "a.nemo", saver="nemo", saver_options={"weights": "ranks"})
    convert(tmp_path / "a.nemo", tmp_path / "b.nemo", tp=2, pp=3, pp_layers="1,2,1")
    files = contents(tmp_path / "b.nemo")
    held = [loaded(files[f"tp_rank_00_pp_rank_00{pp}/model_weights.ckpt"]) for pp in range(3)]
    assert [sum(name.endswith("linear_proj.weight") for name in stage) for stage in held] == [1, 2, 1]
    convert(tmp_path / "b.nemo", tmp_path / "c.nemo", tp=1, pp=1)
    assert contents(tmp_path / "c.nemo")["model_weights.ckpt"] == contents(tmp_path / "a.nemo")["model_weights.ckpt"]
    said = yaml.safe_load(contents(tmp_path / "c.nemo")["model_config.yaml"])
    assert said["num_layers_in_first_pipeline_stage"] is said["num_layers_in_last_pipeline_stage"] is None


def test_distributed_to_ranks_and_back_is_the_same_file(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "a.nemo", saver="nemo")
    convert(tmp_path / "a.nemo", tmp_path / "b.nemo", tp=2, pp=2)
    convert(tmp_path / "b.nemo", tmp_path / "c.nemo", tp=1, pp=1, saver_options={"weights": "distributed"})
    assert (tmp_path / "c.nemo").read_bytes() == (tmp_path / "a.nemo").read_bytes()


@pytest.mark.parametrize("name", [TORCH_DIST, PER_RANK])
def test_unpacked_folder_and_archive_are_one(name: str, archive: Archive, tmp_path: Path) -> None:
    """A folder made by tar, or by us, gives the archive that the archive gives."""
    convert(archive(name), tmp_path / "direct.nemo")
    convert(archive(name), tmp_path / "ours", saver_options={"pack": "false"})
    extracted(archive(name), tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        convert(tmp_path / folder, tmp_path / f"{folder}.nemo")
        assert (tmp_path / f"{folder}.nemo").read_bytes() == (tmp_path / "direct.nemo").read_bytes()
    assert archive_differences(archive(name), tmp_path / "direct.nemo") == []


def test_gzip_is_unpacked_once_where_it_is_told(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(ckptconv.CkptconvError, match=r"--loader\.scratch"):
        convert(archive(GZIPPED), tmp_path / "none.nemo")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    prepared = prepare(Job(archive(GZIPPED), loader_options={"scratch": scratch}))
    (plain,) = scratch.iterdir()
    assert not any(str(tmp_path) in note for note in prepared.stored.extras.notes)  # they go into the manifest
    assert plain.read_bytes() == gzip.decompress(archive(GZIPPED).read_bytes())
    convert(archive(GZIPPED), tmp_path / "out.nemo", loader_options={"scratch": scratch})
    assert list(scratch.iterdir()) == []  # once the result is there
    (tmp_path / "plain.nemo").write_bytes(gzip.decompress(archive(GZIPPED).read_bytes()))
    convert(tmp_path / "plain.nemo", tmp_path / "same.nemo")
    assert (tmp_path / "out.nemo").read_bytes() == (tmp_path / "same.nemo").read_bytes()


@pytest.mark.parametrize(
    ("saver", "wishes"),
    [("mcore", {"tp": 2, "pp": 2}), ("mcore-dist", {}), ("legacy", {"tp": 2})],
    ids=["mcore", "mcore-dist", "legacy"],
)
def test_archive_is_verified_against_every_other_form(
    saver: str, wishes: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "a.nemo", saver="nemo")
    convert(source, tmp_path / "other", saver=saver, **wishes)
    for other in (source, tmp_path / "other"):
        verdict = ckptconv.verify(Job(tmp_path / "a.nemo"), Job(other, vocab_size=392))
        assert verdict.same, verdict.differences
    convert(tmp_path / "other", tmp_path / "b.nemo", saver="nemo", tp=1, pp=1, vocab_size=392)
    convert(tmp_path / "b.nemo", tmp_path / "hf", saver="hf", vocab_size=392, saver_options={"template": source})
    assert hf_leaves(tmp_path / "hf") == hf_leaves(source)


def rank_of(whole: dict[str, Any], tp: int, size: int) -> dict[str, torch.Tensor]:
    """What a tensor rank of Megatron-Core holds of whole, stacked tensors: cut by torch, gate and up each for itself."""
    out: dict[str, torch.Tensor] = {}
    for key, value in whole.items():
        if not isinstance(value, torch.Tensor):
            continue
        layers = value.unbind() if ".layers." in key else (value,)
        for number, layer in enumerate(layers):
            name = key.replace(".layers.", f".layers.{number}.")
            if name.endswith("linear_fc1.weight"):
                out[name] = torch.cat([half.chunk(size)[tp] for half in layer.chunk(2)])
            elif name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
                out[name] = layer.chunk(size)[tp]
            elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                out[name] = layer.chunk(size, 1)[tp].contiguous()
            else:
                out[name] = layer
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_megatron_core_model_are_cut_and_joined_as_they_are(
    size: int, archive: Archive, tmp_path: Path
) -> None:
    """Where NeMo's partition changer joins gate and up of each rank as they come. Held against torch's own slices."""
    official = members(archive(TORCH_DIST))
    ranks = [rank_of(torch_dist(official)[0], tp, size) for tp in range(size)]
    convert(archive(TORCH_DIST), tmp_path / "cut.nemo", tp=size, vocab_divisor=32)
    files = contents(tmp_path / "cut.nemo")
    for tp, rank in enumerate(ranks):
        held = loaded(files[f"mp_rank_{tp:02d}/model_weights.ckpt"])
        assert {key for key in held if not key.endswith("_extra_state")} == rank.keys()
        assert all(torch.equal(held[key], value) for key, value in rank.items())
        buffer = io.BytesIO()
        torch.save({key: value.clone() for key, value in rank.items()}, buffer)
        files[f"mp_rank_{tp:02d}/model_weights.ckpt"] = buffer.getvalue()
    joined = packed(files, tmp_path / "theirs.nemo")
    options = {"weights": "distributed"}
    convert(joined, tmp_path / "joined.nemo", tp=1, vocab_divisor=128, saver_options=options)
    assert archive_differences(archive(TORCH_DIST), tmp_path / "joined.nemo") == []
