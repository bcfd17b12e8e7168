"""NeMo's own archives: to Hugging Face bit for bit, and from there the same archive again; what NeMo's tools fail at, done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ckptconv.testing.checkpoints import write_hf
from tests.nemo.conftest import Archive
from tests.unit.helpers.nemo import GZIPPED, PER_RANK, TORCH_DIST, ZARR
from tools.golden_cases import convert
from tools.golden_checks import hf_leaves
from tools.golden_nemo import archive_differences, config_rows, loaded, members, padding
from tools.rank_files import Leaf, leaf

GOLDEN = Path(__file__).parents[1] / "golden" / "nemo"
MODEL = {TORCH_DIST: "llama_mha", ZARR: "llama_gqa", PER_RANK: "llama_mha", GZIPPED: "llama_mha"}
LEGACY: dict[str, Any] = {"mcore_gpt": "false"}
AGAIN: dict[str, dict[str, Any]] = {
    TORCH_DIST: {},
    ZARR: {"saver_options": {"backend": "zarr"}},
    PER_RANK: {"saver_options": LEGACY, "tp": 2, "pp": 2},
    GZIPPED: {"saver_options": LEGACY},
}


def to_hf(name: str, archive: Archive, into: Path, **wishes: Any) -> Path:
    """The Hugging Face folder of an archive, with the config.json it was made from."""
    options: dict[str, object] = {"config": GOLDEN / "configs" / f"{MODEL[name]}.json"}
    if name == GZIPPED:
        options["scratch"] = into.parent
    convert(archive(name), into, saver="hf", loader_options=options, **wishes)
    return into


@pytest.mark.parametrize("name", [TORCH_DIST, GZIPPED])
def test_archive_to_hugging_face_is_bit_exact(name: str, archive: Archive, tmp_path: Path) -> None:
    found = hf_leaves(to_hf(name, archive, tmp_path / "hf"))
    rows = json.loads((GOLDEN / "hf" / "llama_mha.fp16.json").read_text())
    assert found == {key: Leaf.from_json(row) for key, row in rows.items()}


@pytest.mark.parametrize("name", [PER_RANK, ZARR])
def test_archive_of_which_the_first_rows_are_kept_is_bit_exact_there(
    name: str, archive: Archive, tmp_path: Path
) -> None:
    """The rest is zero in these copies: what is not zero in a first row is the model's own."""
    found = load_file(to_hf(name, archive, tmp_path / "hf") / "model.safetensors")
    rows = load_file(GOLDEN / "hf" / f"{MODEL[name]}.first_rows.safetensors")
    assert found.keys() == rows.keys()
    kept = 0
    for key, row in rows.items():
        have = found[key] if row.ndim == 1 else found[key][:1]
        there = have != 0
        kept += bool(there.any())
        assert torch.equal(have[there], row[there]), key
        assert row.ndim > 1 or torch.equal(have, row), key
    assert kept >= 27  # all but k, v and up, of which groups and blocks begin with others


@pytest.mark.parametrize("name", AGAIN)
def test_hugging_face_gives_the_archive_that_nemo_wrote(name: str, archive: Archive, tmp_path: Path) -> None:
    """Members, names in order, dtypes, bits, rows of padding; the configuration but for what REASONS lists."""
    source = to_hf(name, archive, tmp_path / "hf")
    convert(source, tmp_path / "ours.nemo", saver="nemo", **AGAIN[name])
    assert archive_differences(archive(name), tmp_path / "ours.nemo") == []
    theirs, ours = (members(path)["model_config.yaml"] for path in (archive(name), tmp_path / "ours.nemo"))
    assert "scale_positional_embedding" in config_rows(theirs, ours)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dtype_is_torchs_own_rounding(dtype: str, archive: Archive, tmp_path: Path) -> None:
    plain = load_file(to_hf(TORCH_DIST, archive, tmp_path / "hf") / "model.safetensors")
    convert(archive(TORCH_DIST), tmp_path / "cast.nemo", dtype=dtype)
    convert(tmp_path / "cast.nemo", tmp_path / "back", saver="hf", saver_options={"template": tmp_path / "hf"})
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert hf_leaves(tmp_path / "back") == {key: leaf(value.to(kind)) for key, value in sorted(plain.items())}


# what NeMo's own tools fail at (case.json and log in the facts): a shard of padding alone, Megatron-Core split, rows and no token


def test_padding_of_a_whole_shard_and_more(archive: Archive, tmp_path: Path) -> None:
    """384 rows for 4 ranks of 128: the last rank has none of them. NeMo's partition changer ends with an IndexError."""
    convert(archive(PER_RANK), tmp_path / "tp4.nemo", tp=4, pp=1)
    ranks = [loaded(c) for n, c in members(tmp_path / "tp4.nemo").items() if n.endswith(".ckpt")]
    assert len(ranks) == 4
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert ranks[3][f"model.language_model.{name}"].shape == (128, 64)
    assert padding(tmp_path / "tp4.nemo", 384) == []
    convert(tmp_path / "tp4.nemo", tmp_path / "back.nemo", tp=2, pp=2)
    assert archive_differences(archive(PER_RANK), tmp_path / "back.nemo") == []


@pytest.mark.parametrize("name", [TORCH_DIST, ZARR])
def test_megatron_core_model_is_split_and_merged(name: str, archive: Archive, tmp_path: Path) -> None:
    """NeMo validates the sharding of what it has just cut, and dies."""
    convert(archive(name), tmp_path / "tp2.nemo", tp=2)
    options = {"weights": "distributed", "backend": "zarr" if name == ZARR else "torch_dist"}
    convert(tmp_path / "tp2.nemo", tmp_path / "back.nemo", tp=1, saver_options=options)
    assert archive_differences(archive(name), tmp_path / "back.nemo") == []


def test_rows_of_a_vocabulary_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    """391 rows, 384 tokens: NeMo's converter ends with a size mismatch; here the rows are kept, and come back."""
    write_hf(tmp_path / "hf", "llama", vocab_size=391)
    shutil.copy(GOLDEN / "tokenizers" / "input.model", tmp_path / "hf" / "tokenizer.model")
    convert(tmp_path / "hf", tmp_path / "out.nemo", saver="nemo")
    convert(tmp_path / "out.nemo", tmp_path / "back", saver="hf", saver_options={"template": tmp_path / "hf"})
    assert hf_leaves(tmp_path / "back") == hf_leaves(tmp_path / "hf")
