"""How many files a distributed checkpoint of ours has, and what a release says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptconv
from ckptconv.megatron import dist_saving
from ckptconv.testing.checkpoints import write_hf


def test_there_are_as_many_files_as_tensors_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf")
    nbytes = sum(tensor.nbytes for tensor in ckptconv.load(source).tensors.values())
    for most, count in ((nbytes, 1), (nbytes - 1, 2), (nbytes // 3 - 1, 4)):
        monkeypatch.setattr(dist_saving, "PER_FILE", most)
        plan = ckptconv.prepare(ckptconv.Job(source, saver="mcore-dist", vocab_divisor=1)).plan
        assert sum(file.path.endswith(".distcp") for file in plan.files) == count


def test_a_release_is_of_iteration_0(tmp_path: Path) -> None:
    """Megatron-LM counts from 0 once it has loaded one."""
    source, options = write_hf(tmp_path / "hf"), {"iteration": "release"}
    ckptconv.convert(source, tmp_path / "out", saver="mcore-dist", saver_options=options)
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
    common = torch.load(tmp_path / "out/release/common.pt", weights_only=False)
    assert common["iteration"] == 0
