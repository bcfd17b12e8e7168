"""All that an archive holds is read, carried along, or told."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import ckptconv
from ckptconv.checkpoint import Extras
from ckptconv.errors import FormatError
from ckptconv.pipeline import load
from ckptconv.sizes import human
from tests.cli.conftest import console
from tests.cli.helpers.console import Console
from tests.nemo.conftest import Archive, Files, packed
from tests.unit.helpers.nemo import GZIPPED, PER_RANK, TORCH_DIST, ZARR, contents
from tools.golden_cases import convert
from tools.golden_nemo import archive_differences

__all__ = ["console"]

CONFIG, COMMON = "model_config.yaml", "model_weights/common.pt"
HASH, OTHER = "0123456789abcdef" * 2, "f" * 32
FP8 = "_extra_state with contents (fp8 scaling factors)"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_config(files: Files, **changes: Any) -> Files:
    config = yaml.safe_load(files[CONFIG])
    config["tokenizer"] |= changes.pop("tokenizer", {})
    return {**files, CONFIG: yaml.safe_dump(config | changes, sort_keys=False).encode()}


def extras(source: Path, **wishes: Any) -> Extras:
    return load(source, **wishes).extras


def notes(source: Path, **wishes: Any) -> str:
    return "\n".join(extras(source, **wishes).notes)


def merges(archive: Archive) -> Files:
    """An archive with merges of a tokenizer under a hash, another file that only a nested key names, and one without a hash."""
    files = contents(archive(TORCH_DIST))
    added = {f"{HASH}_merges.txt": b"a b\n" * 400, f"{OTHER}_{HASH}_rules.bin": os.urandom(1000), "old.txt": b"plain"}
    keys = {"adapter": {"rules": f"nemo:{OTHER}_{HASH}_rules.bin"}, "word_list": "./old.txt"}
    return with_config({**files, **added}, tokenizer={"merge_file": f"nemo:{HASH}_merges.txt"}, **keys)


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"saver_options": {"pack": "false"}}], ids=["same", "tp2", "folder"])
def test_every_file_that_the_configuration_names_travels_along(
    layout: dict[str, Any], archive: Archive, tmp_path: Path
) -> None:
    files = merges(archive)
    source = packed(files, tmp_path / "a.nemo")
    convert(source, tmp_path / "b.nemo", **layout)
    out = tmp_path / "b.nemo"
    found = contents(out) if out.is_file() else {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for name in (f"{HASH}_merges.txt", f"{OTHER}_{HASH}_rules.bin", "old.txt"):
        assert found[name] == files[name]
    config = yaml.safe_load(found[CONFIG])
    assert config["adapter"]["rules"] == f"nemo:{OTHER}_{HASH}_rules.bin"
    assert config["word_list"] == "./old.txt"
    named = config["tokenizer"]["model"].removeprefix("nemo:")
    assert found[named] == next(data for name, data in files.items() if name.endswith("tokenizer.model"))
    again = tmp_path / "again.nemo"
    convert(out, again, **layout)
    assert (again.read_bytes() if again.is_file() else b"") == (out.read_bytes() if out.is_file() else b"")


def test_what_travels_nowhere_is_told(archive: Archive, tmp_path: Path) -> None:
    files = {**merges(archive), "README": b"hello", "model_weights/odd.txt": b"x", "unhashed_merges.txt": b"y"}
    told = notes(packed(files, tmp_path / "a.nemo"))
    assert f"and nowhere else: {HASH}_merges.txt, {OTHER}_{HASH}_rules.bin, old.txt" in told
    assert "left behind in the archive: README, unhashed_merges.txt" in told
    assert "left behind in model_weights/: odd.txt" in told
    assert "left behind" not in notes(archive(TORCH_DIST))


@pytest.mark.parametrize("key", ["adapter.rules", "tokenizer.merge_file"])
def test_a_file_that_is_named_and_not_there_is_refused(key: str, archive: Archive, tmp_path: Path) -> None:
    files = merges(archive)
    del files[f"{HASH}_merges.txt" if "merge" in key else f"{OTHER}_{HASH}_rules.bin"]
    with pytest.raises(FormatError, match=rf"refers to files that are not there: {key}"):
        load(packed(files, tmp_path / "a.nemo"))


def test_a_tokenizer_of_another_library_is_carried_as_it_is(archive: Archive, tmp_path: Path) -> None:
    name = f"{HASH}_vocab.json"
    files = {n: data for n, data in contents(archive(TORCH_DIST)).items() if not n.endswith("tokenizer.model")}
    asked = {"library": "tiktoken", "model": f"nemo:{name}", "vocab_file": f"nemo:{name}"}
    source = packed(with_config({**files, name: b"[]"}, tokenizer=asked), tmp_path / "a.nemo")
    convert(source, tmp_path / "b.nemo", vocab_size=384)
    found = contents(tmp_path / "b.nemo")
    assert found[name] == b"[]"
    kept = yaml.safe_load(found[CONFIG])["tokenizer"]
    assert {key: kept[key] for key in asked} == asked
    assert sum("vocab" in n for n in found) == 1


def test_training_state_and_other_entries_of_common_pt_are_told(archive: Archive, tmp_path: Path) -> None:
    files = contents(archive(TORCH_DIST))
    common = {"optimizer": {"param_groups": [{"lr": 1.0}]}, "iteration": 7, "loops": {"fit": 1}, "args": 3}
    source = packed({**files, COMMON: saved(common)}, tmp_path / "a.nemo")
    found = extras(source)
    assert found.step == 7
    assert "optimizer (1 param groups)" in found.state
    assert "left behind in common.pt: args, loops" in found.notes
    with pytest.raises(ckptconv.CkptconvError, match="--optimizer drop"):
        convert(source, tmp_path / "b.nemo")
    convert(source, tmp_path / "b.nemo", optimizer="drop")
    assert archive_differences(archive(TORCH_DIST), tmp_path / "b.nemo") == []
    for junk in (b"junk", saved([1])):
        with pytest.raises(FormatError, match=r"common\.pt"):
            load(packed({**files, COMMON: junk}, tmp_path / "c.nemo"))


def test_a_zarr_archive_has_nothing_to_check(archive: Archive) -> None:
    assert "zarr arrays have no checksums" in notes(archive(ZARR), check=True)
    assert "zarr arrays have no checksums" not in notes(archive(ZARR))
    assert "zarr arrays have no checksums" not in notes(archive(TORCH_DIST), check=True)


def extra_states() -> Iterable[tuple[str, object, bool]]:
    """Real forms of TransformerEngine: BytesIO of torch.save before 2.0, then pickles as bytes in a tensor."""

    def in_file(value: object) -> io.BytesIO:
        return io.BytesIO(saved(value))

    def in_tensor(value: object) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(pickle.dumps(value), np.uint8).copy())

    values: list[tuple[str, object, bool]] = [("None", None, False), ("no entries", {}, False), ("a number", 1.5, True)]
    values += [("a scale", {"scale": 2.0}, True), ("a history", {"amax": [0.0] * 9}, True)]
    for name, value, told in values:
        yield f"file: {name}", in_file(value), told
        yield f"tensor: {name}", in_tensor(value), told
    yield "None", None, False
    yield "empty file", io.BytesIO(), False
    yield "empty tensor", torch.empty(0, dtype=torch.uint8), False
    yield "a scale of its own", in_file({"scale_fwd": torch.ones(3)}), True
    yield "junk", io.BytesIO(b"PK junk"), True


@pytest.mark.parametrize(("name", "state", "told"), list(extra_states()), ids=lambda value: str(value)[:24])
def test_small_scaling_factors_are_told(name: str, state: object, told: bool, archive: Archive, tmp_path: Path) -> None:
    """However few bytes they take; and what says nothing is none, in whichever form."""
    files = contents(archive(PER_RANK))
    rank = "tp_rank_01_pp_rank_001/model_weights.ckpt"
    model = torch.load(io.BytesIO(files[rank]), weights_only=False)
    key = next(key for key in reversed(model) if key.endswith("_extra_state"))
    found = notes(packed({**files, rank: saved(model | {key: state})}, tmp_path / "a.nemo"))
    assert (FP8 in found) == told, name


def test_gzip_is_announced_with_its_size_before_anything_is_written(
    archive: Archive, console: Console, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    ran = console("plan", "reshard", archive(GZIPPED), tmp_path / "out.nemo", "--loader.scratch", scratch)
    (plain,) = scratch.iterdir()
    with tarfile.open(plain) as opened:
        assert opened.getnames()
    assert f"unpacked into the scratch folder ({human(plain.stat().st_size)})" in ran.err
    assert not (tmp_path / "out.nemo").exists()
