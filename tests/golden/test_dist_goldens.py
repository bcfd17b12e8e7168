"""Distributed checkpoints that real Megatron-Core saved: to Hugging Face bit for bit, and one model in every form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptconv
from ckptconv.compare import Verdict
from ckptconv.containers import dcp
from ckptconv.errors import ConfigError, PlanError
from tools.golden_checks import hf_leaves
from tools.golden_dist import Saved, back, distributed

FOLDER = Path(__file__).parent / "mcore"
LIMIT = 4_000_000
SAVED = {golden.title: golden for golden in distributed(FOLDER)}
WITH_ARGS = [golden for golden in SAVED.values() if golden.has_args]
FORMS: dict[str, dict[str, Any]] = {
    "per-rank": {"saver": "mcore", "tp": 2, "pp": 2},
    "zarr": {"saver": "mcore-dist", "saver_options": {"backend": "zarr", "mcore_version": "0.12"}},
    "torch_dist": {"saver": "mcore-dist", "saver_options": {"layers": "separate"}},
}
QUICK = ckptconv.ExecuteOptions(durable=False)


def title(golden: Saved) -> str:
    return golden.title


def test_goldens_are_all_here_and_small() -> None:
    """torch_dist of 0.16.1, dense and with experts, and of 0.12; zarr of 0.12."""
    assert sorted(SAVED) == [
        "llama_tp2pp2",
        "mixtral_seq_perlayer_tp1pp2ep2",
        "torch_dist_mcore0.12.0_llama_bf16_tp2pp2",
        "zarr_mcore0.12.0_llama_bf16_tp2pp2",
    ]
    assert len(WITH_ARGS) == 2
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= LIMIT


@pytest.mark.parametrize("golden", SAVED.values(), ids=title)
def test_it_comes_back_to_hugging_face_bit_for_bit(golden: Saved, tmp_path: Path) -> None:
    assert back(golden, tmp_path / "hf") == []


@pytest.mark.parametrize("golden", SAVED.values(), ids=title)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_verified_against_every_form_it_is_turned_into(golden: Saved, form: str, tmp_path: Path) -> None:
    """And that form holds the official weights, so two equal mistakes of reading cannot pass."""
    options: Mapping[str, Any] = {"execute_options": QUICK, **golden.wishes()}
    ckptconv.convert(golden.folder, tmp_path / "turned", **FORMS[form], **options)
    check_same(ckptconv.verify(golden.job(), ckptconv.Job(tmp_path / "turned", vocab_size=160)))
    ckptconv.convert(
        tmp_path / "turned", tmp_path / "hf", saver="hf", saver_options={"template": golden.hf}, vocab_size=160
    )
    check_same(ckptconv.verify(golden.job(), tmp_path / "hf"))
    assert hf_leaves(tmp_path / "hf") == golden.weights()


def check_same(verdict: Verdict) -> None:
    assert verdict.differences == ()
    assert verdict.tensors > 20


def test_zarr_and_torch_dist_of_one_model_are_verified_against_each_other_and_the_official_weights() -> None:
    """The two that Megatron-Core 0.12 saved, and the Hugging Face folder they were made of."""
    zarr, dist = (SAVED[f"{backend}_mcore0.12.0_llama_bf16_tp2pp2"] for backend in ("zarr", "torch_dist"))
    check_same(ckptconv.verify(zarr.job(), dist.job()))
    check_same(ckptconv.verify(dist.job(), zarr.hf))
    check_same(ckptconv.verify(zarr.job(), zarr.hf))


def test_verify_sees_another_model(tmp_path: Path) -> None:
    """0.16.1's has the same shapes, and was not rounded to bf16."""
    other = SAVED["zarr_mcore0.12.0_llama_bf16_tp2pp2"]
    ckptconv.convert(other.hf, tmp_path / "fp32", saver="hf", dtype="fp32", execute_options=QUICK)
    verdict = ckptconv.verify(SAVED["llama_tp2pp2"].job(), tmp_path / "fp32")
    assert {difference.kind for difference in verdict.differences} == {"values"}


@pytest.mark.parametrize("case", ["llama_tp2pp2", "mixtral_seq_perlayer_tp1pp2ep2"])
def test_layers_and_experts_have_chunks_of_their_own_as_megatron_core_files_them(case: str, tmp_path: Path) -> None:
    golden = SAVED[case]
    ckptconv.convert(golden.folder, tmp_path / "ours", saver="mcore-dist", execute_options=QUICK, **golden.wishes())
    theirs, ours = (grids(next(folder.glob("iter_*"))) for folder in (golden.folder, tmp_path / "ours"))
    assert ours.keys() == theirs.keys()
    for key, counts in theirs.items():
        cut = 1 if "norm" in key else 2  # the axes of the weight itself, which ranks cut and we do not
        assert ours[key] == [*counts[:-cut], *[1] * cut], key


def grids(folder: Path) -> dict[str, list[int]]:
    """How many chunks each tensor has along each axis."""
    return {
        key: [len(set(starts)) for starts in zip(*(chunk.offset for chunk in entry.chunks), strict=True)]
        for key, entry in dcp.read(folder).tensors.items()
    }


@pytest.mark.parametrize("golden", WITH_ARGS, ids=title)
def test_random_states_are_not_lost_in_silence(golden: Saved, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"RNG state(?s:.*)--optimizer drop"):
        ckptconv.convert(golden.folder, tmp_path / "hf", saver="hf", vocab_size=160)


def test_without_args_what_is_missing_is_named(tmp_path: Path) -> None:
    golden = SAVED["torch_dist_mcore0.12.0_llama_bf16_tp2pp2"]
    with pytest.raises(ConfigError, match=r"there are no args(?s:.*)--loader\.config"):
        ckptconv.prepare(replace(golden.job(), loader_options={}, saver="hf"))
