"""The manifest says the same for the same input, names no place, and finds any byte that changed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import xxhash

from ckptconv.dtypes import UINT8
from ckptconv.errors import FormatError
from ckptconv.executor.execute import execute
from ckptconv.executor.manifest import damage, read_manifest, relative
from ckptconv.executor.units import PIECE
from ckptconv.leaves import contiguous
from ckptconv.plan import File, Plan, Segment
from ckptconv.source import Source
from ckptconv.testing.plans import mixed_bytes, mixed_plan, write_source


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    source = write_source(folder / "source.bin", mixed_bytes(1))
    execute(mixed_plan(source), folder / "out")
    return folder / "out"


def test_equal_inputs_elsewhere_give_equal_bytes(result: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.bin", mixed_bytes(1))
    execute(mixed_plan(source), tmp_path / "other")
    text = (result / "ckptconv.json").read_text()
    assert (tmp_path / "other" / "ckptconv.json").read_text() == text
    assert str(tmp_path) not in text
    assert "/" + result.parent.name not in text


@pytest.mark.parametrize("room", [0, 500])
def test_equal_bytes_however_many_lines_were_worked_out_early(
    room: int, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptconv.executor.complete.HOLDS", room)
    source = write_source(tmp_path / "source.bin", mixed_bytes(1))
    execute(mixed_plan(source), tmp_path / "other")
    assert (tmp_path / "other" / "ckptconv.json").read_bytes() == (result / "ckptconv.json").read_bytes()


def test_a_tensor_of_several_pieces_has_the_digest_of_all(tmp_path: Path) -> None:
    size = 2 * PIECE + 6
    source = write_source(tmp_path / "source.bin", size)
    tensor = contiguous(Source(str(source), 0, size), (size,), UINT8)
    execute(Plan((File("f", size, (Segment(0, tensor, "large"),)),)), tmp_path / "out")
    manifest, data = read_manifest(tmp_path / "out"), source.read_bytes()
    assert manifest is not None
    digests = b"".join(xxhash.xxh3_128_digest(data[at : at + PIECE]) for at in range(0, size, PIECE))
    assert manifest.files["f"].tensors[0].digest == xxhash.xxh3_128_hexdigest(digests)
    assert not damage(tmp_path / "out", manifest)


def test_says_where_each_tensor_came_from(result: Path) -> None:
    manifest = read_manifest(result)
    assert manifest is not None
    assert manifest.about == {"ckptconv": "test", "options": {"scale": 1}}
    assert manifest.sources == {"source.bin": mixed_bytes(1)}
    tensors = {t.name: t for t in manifest.files["deep/er/model.safetensors"].tensors}
    assert tensors["turned"].origin == ("source.bin",)
    assert tensors["constant"].origin == ()
    assert tensors["cast"].nbytes == 256 * 1024 * 4


def test_whole_result_has_no_damage(result: Path) -> None:
    manifest = read_manifest(result)
    assert manifest is not None
    assert damage(result, manifest) == []


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_bit_is_found(result: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    copy = tmp_path / "copy"
    shutil.copytree(result, copy)
    manifest = read_manifest(copy)
    assert manifest is not None
    name = rng.choice(sorted(manifest.files))
    data = bytearray((copy / name).read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    (copy / name).write_bytes(data)
    (problem,) = damage(copy, manifest)
    assert problem.startswith(f"{name}: ")


def test_missing_and_cut_files_are_found(result: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(result, copy)
    (copy / "index.json").unlink()
    (copy / "rank_1/model.pt").write_bytes(b"short")
    manifest = read_manifest(copy)
    assert manifest is not None
    found = "\n".join(damage(copy, manifest))
    assert "index.json: No such file" in found
    assert "rank_1/model.pt: has 5 bytes" in found


def test_none_where_there_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda facts: facts.pop("files"),
        lambda facts: facts.update(manifest=2),
        lambda facts: facts.update(files={"../../etc/passwd": next(iter(facts["files"].values()))}),
        lambda facts: facts.update(files={"a": {"size": "x", "rest": "", "tensors": {}}}),
        lambda facts: facts.update(files=[1]),
    ],
)
def test_odd_manifest_is_a_format_error(result: Path, tmp_path: Path, edit: object) -> None:
    facts = json.loads((result / "ckptconv.json").read_text())
    assert callable(edit)
    edit(facts)
    (tmp_path / "ckptconv.json").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match=r"ckptconv\.json"):
        read_manifest(tmp_path)
    (tmp_path / "ckptconv.json").write_text("{")
    with pytest.raises(FormatError, match="is not valid JSON"):
        read_manifest(tmp_path)


def test_relative_never_leaves_the_root() -> None:
    assert relative("/a/b/c/d.bin", "/a/b") == "c/d.bin"
    assert relative("/a/x/d.bin", "/a/b") == "d.bin"
    assert relative("/a/x/d.bin", "") == "d.bin"
