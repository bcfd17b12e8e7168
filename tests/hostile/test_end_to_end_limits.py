"""What cannot be seen, as docs/formats/integrity.md says: damage that is taken for weights, since nothing in the files contradicts it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv import CkptconvError, convert, prepare
from ckptconv.pipeline import Job
from tests.hostile.bases import QUICK
from tests.hostile.damage import Act, copied, edit_json, from_other, rank_pt
from tests.hostile.damage_bits import body, data_of, flip, whole
from tests.hostile.damage_hf import BIN, CONFIG, ONE, SHARDS


def stage(folder: Path) -> None:
    for tp in (0, 1):
        from_other(rank_pt(1, tp))(folder)


# what -> (base, laid beside it, damage, whether --check finds it)
UNSEEN: dict[str, tuple[str, str, Act, bool]] = {
    "a bit of a rank's tensor": ("mcore", "", flip(rank_pt(0, 0), data_of("/data/0"), 0.1, 3), True),
    "a bit of a .bin": ("bin", "", flip(BIN, data_of("/data/1"), 0.5, 3), True),
    "a bit of a safetensors file": ("hf", "", flip(ONE, body, 0.5, 3), False),
    "a bit of a safetensors result": ("shards", "", flip(SHARDS[0], body, 0.5, 3), True),
    "a bit of an old .bin": ("old bin", "", flip(BIN, whole, 0.9, 3), False),
    "a digit of config.json": ("hf", "", edit_json(CONFIG, lambda t: t.update(rope_theta=7.0)), False),
    "a shard of another model": ("shards", "shards other", from_other(SHARDS[1]), True),
    "a rank copied over its neighbour": ("mcore", "", copied(rank_pt(0, 0), rank_pt(0, 1)), True),
    "a stage of another model": ("mcore", "mcore other", stage, True),
}


def lay_out(what: str, bases: dict[str, Path], folder: Path) -> tuple[Path, dict[str, Any]]:
    base, other, act, _ = UNSEEN[what]
    source = Path(shutil.copytree(bases[base], folder / "source"))
    if other:
        shutil.copytree(bases[other], folder / "other")
    act(source)
    return source, {"saver": "hf"} if base == "mcore" else {"saver": "mcore", "tp": 2}


@pytest.mark.parametrize("what", UNSEEN)
def test_unseen_unless_a_checksum_is_compared(what: str, bases: dict[str, Path], tmp_path: Path) -> None:
    source, form = lay_out(what, bases, tmp_path)
    convert(source, tmp_path / "result", execute_options=QUICK, **form)
    if not UNSEEN[what][3]:
        convert(source, tmp_path / "checked", execute_options=QUICK, check=True, **form)
        return
    with pytest.raises(CkptconvError):
        convert(source, tmp_path / "checked", execute_options=QUICK, check=True, **form)


@pytest.mark.parametrize("base", ["hf", "bin", "old bin"])
def test_check_says_where_it_had_nothing_to_compare(base: str, bases: dict[str, Path]) -> None:
    (note,) = prepare(Job(bases[base], saver="mcore", check=True)).checkpoint.extras.notes
    assert "no ckptconv.json" in note


@pytest.mark.parametrize("base", ["shards", "mcore", "legacy", "moe"])
def test_check_of_a_result_needs_no_note(base: str, bases: dict[str, Path]) -> None:
    assert prepare(Job(bases[base], saver="hf", check=True)).checkpoint.extras.notes == ()


def test_iteration_folder_is_checked_by_the_manifest_above_it(bases: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(bases["mcore"], tmp_path / "source"))
    flip("hf/config.json", whole, 0.1, 0)(source)
    with pytest.raises(CkptconvError, match=r"hf/config\.json"):
        prepare(Job(source / "iter_0000001", saver="hf", check=True, loader_options={"config": bases["hf"]}))


def test_training_that_went_on_in_a_result_is_not_held_against_its_manifest(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(bases["mcore"], tmp_path / "source"))
    (source / "iter_0000001").rename(source / "iter_0000005")
    (source / "latest_checkpointed_iteration.txt").write_text("5")
    notes = prepare(Job(source, saver="hf", check=True)).checkpoint.extras.notes
    assert any("of other files" in note for note in notes)


@pytest.mark.parametrize("base", ["mcore", "bin"])
def test_file_without_checksums_is_not_passed_over(base: str, bases: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(bases[base], tmp_path / "source"))
    name = BIN if base == "bin" else rank_pt(0, 0)
    state = torch.load(source / name, weights_only=False)
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        torch.save(state, source / name)
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    with pytest.raises(CkptconvError, match="written without CRC32s"):
        prepare(Job(source, saver="legacy" if base == "bin" else "hf", check=True))
