"""The judge of distributed checkpoints judged: what Megatron-Core saved at one layout computes the same at others, and damage shows."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from tests.judge.dist import judge_dist_logits
from tests.judge.dist_write import write_dist
from tests.judge.judge import iteration_folder
from tests.judge.ranks import Layout

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
DIVISOR = 16
TOLERANCE = 1e-5
Hf = Callable[..., Path]
Expected = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A model saved at one layout, and the layouts it is loaded at."""

    kind: str
    saved: Layout
    loaded: tuple[Layout, ...]
    form: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.kind, self.saved.name, *(str(v) if v is not True else k for k, v in self.form.items())])


CASES = [
    Case("llama", Layout(tp=2, pp=2), (Layout(), Layout(tp=4), Layout(pp=2, vpp=2))),
    Case("llama", Layout(pp=2, vpp=2), (Layout(tp=2),), {"singleton": True}),
    Case("llama-tied", Layout(), (Layout(tp=2, pp=2),), {"layers": "separate"}),
    Case("qwen2", Layout(dp=2, pp=2), (Layout(pp=4), Layout(tp=2, dp=2)), {"fully_parallel": True}),
    Case("qwen3", Layout(tp=4), (Layout(tp=2, pp=2),), {"singleton": True}),
    Case("mixtral", Layout(tp=2), (Layout(ep=4), Layout(tp=2, pp=2))),
    Case("mixtral", Layout(ep=2, pp=2), (Layout(tp=2, ep=2, etp=1),), {"singleton": True, "fully_parallel": True}),
]


@pytest.mark.parametrize("from_args", [False, True], ids=["config", "args"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_megatron_core_saved_computes_the_logits_of_transformers(
    case: Case, from_args: bool, hf: Hf, ids: torch.Tensor, expected: Expected, tmp_path: Path
) -> None:
    source = hf(case.kind)
    folder = write_dist(source, tmp_path, case.saved, divisor=DIVISOR, **case.form)
    for layout in case.loaded:
        found = judge_dist_logits(folder, source, ids, layout, divisor=DIVISOR, from_args=from_args)
        np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE, err_msg=layout.name)


def test_stored_vocabulary_rows_need_not_be_those_of_the_model(
    hf: Hf, ids: torch.Tensor, expected: Expected, tmp_path: Path
) -> None:
    """144 rows are stored; models of 256 and, with a divisor of 1, of 131 read what both have."""
    source = hf("llama")
    folder = write_dist(source, tmp_path, Layout(), divisor=DIVISOR)
    for divisor in (128, 1):
        found = judge_dist_logits(folder, source, ids, Layout(), divisor=divisor)
        np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("shared", "writers"), [(False, {0, 2}), (True, {0, 1, 2, 3})])
def test_data_parallel_ranks_share_the_writing_only_when_told_to(
    shared: bool, writers: set[int], hf: Hf, tmp_path: Path
) -> None:
    folder = write_dist(hf("llama"), tmp_path, Layout(dp=2, pp=2), divisor=DIVISOR, fully_parallel=shared)
    files = iteration_folder(folder).glob("*.distcp")
    assert {int(path.name.split("_")[2]) for path in files} == writers


PROJ = "decoder.layers.self_attention.linear_proj.weight"


def exchange(metadata: Metadata) -> None:
    """The bytes of layer 0 are said to be those of layer 1, and the other way round."""
    assert metadata.storage_data is not None
    one, two = (i for i in metadata.storage_data if i.fqn == PROJ and i.offset is not None and i.offset[0] < 2)
    places = metadata.storage_data
    places[one], places[two] = places[two], places[one]


def drop_chunk(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[PROJ].chunks[0]  # type: ignore[union-attr]


def drop_tensor(metadata: Metadata) -> None:
    del metadata.state_dict_metadata[PROJ]


def add_tensor(metadata: Metadata) -> None:
    metadata.state_dict_metadata["spare.weight"] = metadata.state_dict_metadata[PROJ]


@pytest.fixture
def edited(hf: Hf, tmp_path: Path) -> Callable[[Callable[[Metadata], None]], Path]:
    def get(edit: Callable[[Metadata], None]) -> Path:
        folder = write_dist(hf("llama"), tmp_path, Layout(), divisor=DIVISOR)
        saved = iteration_folder(folder)
        metadata = FileSystemReader(saved).read_metadata()
        edit(metadata)
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
        return folder

    return get


Edited = Callable[[Callable[[Metadata], None]], Path]


def test_a_tensor_with_wrong_values_moves_the_logits(
    edited: Edited, hf: Hf, ids: torch.Tensor, expected: Expected
) -> None:
    found = judge_dist_logits(edited(exchange), hf("llama"), ids, Layout(pp=2), divisor=DIVISOR)
    assert np.abs(found - expected(hf("llama"))).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_chunk, r"AssertionError: decoder.layers.0.self_attention.linear_proj.weight"),  # NaN is left
        (drop_tensor, rf"Unexpected keys.*{PROJ}"),
        (add_tensor, r"Missing keys.*spare.weight"),
    ],
)
def test_what_is_missing_or_left_over_is_an_error(
    edit: Callable[[Metadata], None], words: str, edited: Edited, hf: Hf, ids: torch.Tensor
) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){words}"):
        judge_dist_logits(edited(edit), hf("llama"), ids, Layout(), divisor=DIVISOR)


def test_random_states_are_left_over_for_who_loads_a_model_alone(
    hf: Hf, ids: torch.Tensor, expected: Expected, tmp_path: Path
) -> None:
    source = hf("llama")
    folder = write_dist(source, tmp_path, Layout(tp=2), divisor=DIVISOR, rng=True)
    found = judge_dist_logits(folder, source, ids, Layout(), divisor=DIVISOR, strict="assume_ok_unexpected")
    np.testing.assert_allclose(found, expected(source), rtol=0, atol=TOLERANCE)
    with pytest.raises(RuntimeError, match="rng_state"):
        judge_dist_logits(folder, source, ids, Layout(), divisor=DIVISOR)
