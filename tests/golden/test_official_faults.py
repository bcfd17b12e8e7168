"""Known faults of the official converters: what their file says or holds beside what ours does, and what they cannot do at all."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import pytest
import torch

from ckptconv.errors import CkptconvError
from tools.golden_cases import Golden, condensed, convert
from tools.golden_checks import differences
from tools.make_manifests import INTO
from tools.rank_files import leaves, rank_states, read

CONDENSED = list(condensed(INTO))


def written(golden: Golden, work: Path) -> dict[str, object]:
    convert(golden.source, work, **golden.wishes())
    return dict(vars(next(iter(rank_states(work).values()))["args"]))


def golden_named(title: str) -> Golden:
    return next(golden for golden in CONDENSED if golden.title == title)


def test_official_savers_lose_the_dtype_and_their_resharding_upcasts(tmp_path: Path) -> None:
    golden = golden_named("a-llama2-mha-bf16/out-v012-te-tp2pp2")
    assert golden.args is not None
    assert (golden.args["bf16"], golden.args["params_dtype"]) == (False, "torch.float32")
    ours = written(golden, tmp_path / "out")
    assert (ours["bf16"], str(ours["params_dtype"])) == (True, "torch.bfloat16")
    again = golden_named("a-llama2-mha-bf16/out-i-v09-mcore2mcore-tp1pp4")
    assert {v.kind for held in again.ranks().values() for v in held.values() if v.digest} == {"float32"}
    convert(tmp_path / "out", tmp_path / "again", tp=1, pp=4)
    kinds = {v.kind for state in rank_states(tmp_path / "again").values() for v in leaves(state).values() if v.digest}
    assert "float32" not in kinds


def test_official_loaders_lose_the_rotary_base(tmp_path: Path) -> None:
    golden = golden_named("b-llama3-gqa/out-v012-te-tp2pp2")
    assert golden.args is not None
    assert golden.args["rotary_base"] == 10000
    assert written(golden, tmp_path / "out")["rotary_base"] == 500000


def test_official_loader_of_010_unties_a_tied_model(tmp_path: Path) -> None:
    golden = golden_named("d-qwen25-tied/out-v010-te-tp2pp2")
    assert golden.args is not None
    assert golden.args["untie_embeddings_and_output_weights"] is True
    assert written(golden, tmp_path / "out")["untie_embeddings_and_output_weights"] is False


def test_official_files_need_megatrons_classes_and_ours_none(tmp_path: Path) -> None:
    """With Namespace allowed, torch's weights-only reader opens ours; of theirs it refuses the enums of the version."""

    def weights_only(path: Path) -> object:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, weights_only=True)

    golden = golden_named("d-qwen25-tied/out-v012-te-tp2pp2")
    theirs = next(golden.folder.rglob("*.pt"))
    with pytest.raises(pickle.UnpicklingError, match=r"megatron|BytesIO"):
        weights_only(theirs)
    options = {k: v for k, v in golden.wishes()["saver_options"].items() if k == "transformer_impl"}
    convert(golden.source, tmp_path / "out", **(golden.wishes() | {"saver_options": options}))
    assert weights_only(next((tmp_path / "out").rglob("*.pt")))
    assert read(theirs)


def test_legacy_saver_pads_the_output_layer_which_the_official_one_cannot(tmp_path: Path) -> None:
    """Its 0.10 and 0.12 stop at a vocabulary of 131 with a size mismatch on the last stage."""
    source = golden_named("a-llama2-mha-bf16/out-v012-te-tp2pp2").hf
    convert(source, tmp_path / "out", saver="legacy", tp=2, pp=2, vocab_divisor=128)
    shapes = {
        name: leaf.shape
        for state in rank_states(tmp_path / "out").values()
        for name, leaf in leaves(state).items()
        if name.endswith(("output_layer/weight", "word_embeddings/weight"))
    }
    assert set(shapes.values()) == {(128, 64)}


def test_mixtral_converts_for_010_and_012_where_the_official_loader_fails(tmp_path: Path) -> None:
    golden = golden_named("f-mixtral/out-v09-te-tp2pp1ep2")
    for version in ("0.10", "0.12"):
        options = golden.wishes()["saver_options"] | {"mcore_version": version}
        convert(golden.source, tmp_path / version, **(golden.wishes() | {"saver_options": options}))
        ours = {rank: leaves(state) for rank, state in rank_states(tmp_path / version).items()}
        weights = {r: {k: v for k, v in held.items() if "_extra_state" not in k} for r, held in golden.ranks().items()}
        found = {r: {k: v for k, v in held.items() if "_extra_state" not in k} for r, held in ours.items()}
        assert differences(weights, found) == []


def test_a_source_of_experts_is_resharded_where_the_official_loader_fails(tmp_path: Path) -> None:
    """0.12 knows no loop over expert ranks; ours goes from ep 2 to ep 1 and pp 2, and back to the same bits."""
    golden = golden_named("f-mixtral/out-v09-te-tp2pp1ep2")
    loader = {"loader_options": {"config": golden.hf}}
    convert(golden.folder, tmp_path / "one", saver="mcore", tp=1, pp=2, ep=1, **loader)
    wishes = golden.wishes() | loader
    convert(tmp_path / "one", tmp_path / "two", **wishes)
    ours = {rank: leaves(state) for rank, state in rank_states(tmp_path / "two").items()}
    assert differences(golden.ranks(), ours) == []


def test_a_layout_said_wrongly_of_an_official_file_is_refused(tmp_path: Path) -> None:
    golden = golden_named("a-llama2-mha-bf16/out-v010-te2-tp2pp2")
    with pytest.raises(CkptconvError, match="tp"):
        convert(golden.folder, tmp_path / "out", tp="4:2", loader_options={"config": golden.hf})
