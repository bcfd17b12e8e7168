"""What is asked of an archive, what it takes from its source, and what the user is told of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ckptconv.errors import UsageError
from ckptconv.nemo.rope_buffer import inverse_frequencies
from ckptconv.pipeline import Job, load, prepare
from ckptconv.testing.checkpoints import write_hf
from tests.nemo.conftest import Archive, packed
from tests.unit.helpers.nemo import PER_RANK, TORCH_DIST, contents
from tools.golden_cases import convert
from tools.golden_nemo import loaded, members, torch_dist

TOKENIZERS = Path(__file__).parents[1] / "golden" / "nemo" / "tokenizers"
EMBED, HEAD = "model.embedding.word_embeddings.weight", "model.output_layer.weight"


def told(source: Path, **wishes: Any) -> list[str]:
    """What the user reads when the archive is there; the manifest has the same."""
    prepared = prepare(Job(source, saver="nemo", **wishes))
    notes = [
        line.removeprefix("note: ") for line in prepared.usage("out.nemo").splitlines() if line.startswith("note: ")
    ]
    assert prepared.plan.about["format_notes"] == notes
    return notes


def model(place: Path, tokenizer: str = "", **config: Any) -> Path:
    folder = write_hf(place / "hf", "llama", **config)
    if tokenizer:
        shutil.copy(TOKENIZERS / tokenizer, folder / "tokenizer.model")
    return folder


def test_files_without_a_place_in_an_archive_are_told(tmp_path: Path) -> None:
    source = model(tmp_path, "input.model", vocab_size=384)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_text("{}")
    names = "config.json, generation_config.json, tokenizer.json, tokenizer_config.json"
    assert told(source) == [f"an archive has no place for {names}"]


def test_a_tokenizer_that_is_not_packed_is_told(archive: Archive, tmp_path: Path) -> None:
    source = model(tmp_path, vocab_size=384)
    first, second = told(source)
    assert first == "an archive has no place for config.json"
    assert "no tokenizer is packed" in second
    assert told(source, saver_options={"tokenizer": TOKENIZERS / "input.model"}) == [first]
    assert told(archive(TORCH_DIST)) == []


@pytest.mark.parametrize("wishes", [{"tp": 2}, {"saver_options": {"mcore_gpt": "false"}}], ids=["tp", "legacy"])
def test_a_backend_is_refused_where_weights_are_not_distributed(wishes: dict[str, Any], tmp_path: Path) -> None:
    source = model(tmp_path, "input.model", vocab_size=384, num_key_value_heads=8)
    options = {**wishes.pop("saver_options", {}), "backend": "zarr"}
    with pytest.raises(UsageError, match=r"--saver\.backend zarr: about distributed weights"):
        convert(source, tmp_path / "out.nemo", saver="nemo", saver_options=options, **wishes)


def keys(path: Path) -> set[str]:
    """The names in the first rank's file."""
    found = members(path)
    return set(loaded(next(found[name] for name in found if name.endswith(".ckpt"))))


@pytest.mark.parametrize("kind", ["legacy", "local", "te"])
def test_the_kind_of_model_is_that_of_the_source(kind: str, tmp_path: Path) -> None:
    """Though its configuration may be silent: the names of the tensors tell."""
    source = model(tmp_path, "input.model", vocab_size=384, num_key_value_heads=8, num_hidden_layers=4)
    options: dict[str, Any] = {
        "legacy": {"mcore_gpt": "false"},
        "local": {"transformer_impl": "local", "weights": "ranks"},
        "te": {"weights": "ranks"},
    }[kind]
    convert(source, tmp_path / "a.nemo", saver="nemo", saver_options=options)
    files = contents(tmp_path / "a.nemo")
    config = yaml.safe_load(files["model_config.yaml"])
    said = {name: config.pop(name) for name in ("mcore_gpt", "transformer_engine")}
    assert said == {"mcore_gpt": kind != "legacy", "transformer_engine": kind == "te"}
    packed({**files, "model_config.yaml": yaml.safe_dump(config).encode()}, tmp_path / "silent.nemo")
    for name in ("a", "silent"):
        convert(tmp_path / f"{name}.nemo", tmp_path / f"{name}-pp2.nemo", pp=2)
        convert(tmp_path / f"{name}-pp2.nemo", tmp_path / f"{name}-back.nemo", pp=1)
        assert keys(tmp_path / f"{name}-back.nemo") == keys(tmp_path / "a.nemo")
        back = yaml.safe_load(members(tmp_path / f"{name}-back.nemo")["model_config.yaml"])
        assert {key: back[key] for key in said} == said
    if kind == "local":
        convert(tmp_path / "a.nemo", tmp_path / "dist.nemo", saver_options={"weights": "distributed"})
        assert yaml.safe_load(members(tmp_path / "dist.nemo")["model_config.yaml"])["transformer_engine"] is False


@pytest.mark.parametrize("percent", [1.0, 0.5])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_frequencies_are_those_that_torch_works_out(size: int, base: float, percent: float, tmp_path: Path) -> None:
    """As NeMo's module does it; at these sizes to the last bit."""
    config = load(model(tmp_path)).config
    assert config.rope is not None
    found = inverse_frequencies(replace(config, head_dim=size, rope=replace(config.rope, base=base, percent=percent)))
    turned = int(size * percent)
    theirs = 1.0 / (base ** (torch.arange(0, turned, 2).float() / turned))
    assert found is not None
    assert found.tolist() == theirs.tolist()


def expected(table: torch.Tensor, fill: str, rows: int) -> torch.Tensor:
    """By torch: the true rows, and the same row again and again."""
    row = {"zero": table[-1] * 0, "last": table[-1], "mean": table.double().mean(0).to(table.dtype)}[fill]
    return torch.cat([table, row.expand(rows - len(table), -1)])


@pytest.mark.parametrize("fill", ["last", "zero", "mean"])
def test_rows_that_pad_the_vocabulary_are_as_asked_for(fill: str, archive: Archive, tmp_path: Path) -> None:
    """Of NeMo's own weights, in whole tensors and cut over ranks of which the last holds padding alone."""
    options = {"vocab_fill": fill}
    convert(archive(TORCH_DIST), tmp_path / "whole.nemo", vocab_divisor=256, saver_options=options)
    convert(archive(TORCH_DIST), tmp_path / "ranks.nemo", tp=4, saver_options=options)
    theirs, ours = (torch_dist(members(path))[0] for path in (archive(TORCH_DIST), tmp_path / "whole.nemo"))
    ranks = [loaded(data) for name, data in members(tmp_path / "ranks.nemo").items() if name.endswith(".ckpt")]
    for name in (EMBED, HEAD):
        assert theirs[name].shape == (384, 64)
        assert torch.equal(ours[name], expected(theirs[name], fill, 512))
        assert torch.equal(torch.cat([rank[name] for rank in ranks]), expected(theirs[name], fill, 512))


def test_padding_that_is_there_is_not_made_anew(archive: Archive, tmp_path: Path) -> None:
    """And whoever asks for it hears so: 512 rows of 384 true ones, for tp 2 as for tp 4."""
    with pytest.raises(UsageError, match=r"--saver\.vocab-fill mean: the 128 rows .* stay as they are"):
        convert(archive(PER_RANK), tmp_path / "ranks.nemo", tp=4, pp=1, saver_options={"vocab_fill": "mean"})
