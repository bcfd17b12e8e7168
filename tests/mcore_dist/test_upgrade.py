"""Checkpoints that the real tools wrote, of every era there is one of, upgraded and then computed with by today's Megatron-Core."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckptconv
from ckptconv.errors import UsageError
from ckptconv.executor.execute import execute
from ckptconv.pipeline import Job
from ckptconv.testing.models import hf_logits, token_ids
from ckptconv.upgrade import prepare_upgrade
from tests.judge.dist import judge_dist_logits
from tests.judge.ranks import Layout

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True)
class Era:
    """A folder as written, the format it is of, and what must be said of the change."""

    folder: str
    format: str
    says: str


ERAS = [
    Era("mlm/d-qwen25-tied/out-v012-legacy-tp2pp2", "legacy", "Megatron-LM before Megatron-Core"),
    Era("mlm/d-qwen25-tied/out-v012-te-tp2pp2", "mcore", "4 rank files -> whole tensors"),
    Era("mlm/f-mixtral/out-v09-te-tp2pp1ep2", "mcore", "names: of mcore -> of mcore-dist-stacked"),
    Era("mcore/zarr_mcore0.12.0_llama_bf16_tp2pp2/ckpt", "mcore-dist", "distributed (zarr)"),
    Era("mcore/torch_dist_mcore0.12.0_llama_bf16_tp2pp2/ckpt", "mcore-dist", "distributed (torch_dist)"),
]


@pytest.mark.parametrize("era", ERAS, ids=lambda era: era.folder)
def test_upgraded_checkpoints_load_and_compute_the_same(era: Era, tmp_path: Path) -> None:
    hf = GOLDEN / era.folder.rpartition("/")[0] / "hf"
    vocab = json.loads((hf / "config.json").read_text())["vocab_size"]
    asked: dict[str, Any] = {"loader_options": {"config": hf}, "vocab_size": vocab, "dtype": "fp32"}
    job = Job(GOLDEN / era.folder, saver_options={"transformer_impl": "local"}, **asked)
    prepared, changes = prepare_upgrade(job)
    assert prepared.checkpoint.origin.format == era.format
    assert era.says in "\n".join(changes)
    execute(prepared.plan, tmp_path / "new")
    ckptconv.convert(GOLDEN / era.folder, tmp_path / "hf", saver="hf", saver_options={"template": hf}, **asked)
    ids = token_ids(vocab=vocab)
    found = judge_dist_logits(tmp_path / "new", tmp_path / "hf", torch.from_numpy(ids), Layout(tp=2))
    np.testing.assert_allclose(found, hf_logits(tmp_path / "hf", ids), rtol=0, atol=1e-5)


def test_only_checkpoints_of_megatron_are_upgraded() -> None:
    with pytest.raises(UsageError, match="no era of Megatron"):
        prepare_upgrade(Job(GOLDEN / "mlm/f-mixtral/hf"))
