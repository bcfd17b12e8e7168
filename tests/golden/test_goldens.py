"""Files of the official converters beside ours: from Hugging Face bit for bit theirs, and theirs back to Hugging Face bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.golden_args import args_rows, unexplained
from tools.golden_cases import Golden, condensed, convert, with_optimizer
from tools.golden_checks import backward, differences, forward, weights_of_training
from tools.make_manifests import INTO, LIMIT
from tools.rank_files import Leaf

CONDENSED = list(condensed(INTO))
FORWARD = [golden for golden in CONDENSED if golden.source.is_dir()]
WHOLE = [Golden(path.parents[0], path.name) for path in sorted(INTO.glob("*/*-tp*")) if path.is_dir()]
TRAINED = list(with_optimizer(INTO))


def title(golden: Golden) -> str:
    return golden.title


def test_goldens_are_all_here_and_small() -> None:
    assert (len(CONDENSED), len(FORWARD), len(WHOLE), len(TRAINED)) == (23, 19, 7, 1)
    assert sum(path.stat().st_size for path in INTO.rglob("*") if path.is_file()) <= LIMIT


@pytest.mark.parametrize("golden", FORWARD, ids=title)
def test_conversion_gives_the_official_files(golden: Golden, tmp_path: Path) -> None:
    """The same rank files, names in the same order, kinds, shapes, dtypes and bits; the same extra states."""
    assert forward(golden, tmp_path / "out") == []


@pytest.mark.parametrize("golden", WHOLE, ids=title)
def test_official_files_come_back_to_hugging_face_bit_for_bit(golden: Golden, tmp_path: Path) -> None:
    assert backward(golden, tmp_path / "out") == []


@pytest.mark.parametrize("golden", [g for g in CONDENSED if g not in FORWARD], ids=title)
def test_resharding_what_we_wrote_gives_the_official_files(golden: Golden, tmp_path: Path) -> None:
    """Their source is an official output that does not travel; ours in its place is the same bit for bit (tested above)."""
    first = next(g for g in CONDENSED if g.folder == golden.source)
    case = tmp_path / golden.case.name
    case.mkdir()
    convert(first.source, case / golden.source.name, **first.wishes())
    (case / "hf").symlink_to(golden.hf)
    moved = Golden(case, golden.name, golden.command, golden.version, golden.te, golden.manifest)
    assert forward(moved, tmp_path / "out") == []


@pytest.mark.parametrize("folder", TRAINED, ids=lambda path: path.name)
def test_weights_leave_a_training_checkpoint_only_when_the_rest_is_given_up(folder: Path, tmp_path: Path) -> None:
    assert weights_of_training(folder, tmp_path / "out") == []


@pytest.mark.parametrize("golden", [g for g in FORWARD if g.source == g.hf], ids=title)
def test_args_differ_from_the_official_ones_only_where_it_is_known_why(golden: Golden, tmp_path: Path) -> None:
    assert unexplained(args_rows(golden, tmp_path / "out")) == []


def test_the_manifests_are_those_of_the_whole_files() -> None:
    held = {golden.title: golden.ranks() for golden in CONDENSED}
    for golden in WHOLE:
        if golden.title in held:
            assert golden.ranks() == held[golden.title]


def test_the_comparison_sees_every_kind_of_difference(tmp_path: Path) -> None:
    theirs = {"mp_rank_00": {"a": Leaf("bfloat16", (2,), "11"), "b": Leaf("NoneType")}}
    assert differences(theirs, {"mp_rank_01": theirs["mp_rank_00"]})
    for held in (
        {"a": Leaf("bfloat16", (2,), "12"), "b": Leaf("NoneType")},
        {"a": Leaf("float16", (2,), "11"), "b": Leaf("NoneType")},
        {"a": Leaf("bfloat16", (2, 1), "11"), "b": Leaf("NoneType")},
        {"a": Leaf("bfloat16", (2,), "11"), "b": Leaf("BytesIO")},
        {"b": Leaf("NoneType"), "a": Leaf("bfloat16", (2,), "11")},
        {"a": Leaf("bfloat16", (2,), "11")},
    ):
        assert differences(theirs, {"mp_rank_00": held}), held
    assert differences(theirs, theirs) == []
