"""Where a parameter stands in a flat buffer: held against the class of Megatron-Core that lays them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ
from ckptconv.dtypes import BF16
from ckptconv.megatron.optimizer.buffers import bucket_size, buffers
from ckptconv.megatron.optimizer.members import Member
from tests.judge.patches import prepare
from tests.optim.convert import in_training, stored
from tests.optim.rank_runs import FLAT_FILE, RANK_FILE

SIZES = st.lists(st.integers(1, 400), min_size=1, max_size=8)


def in_the_file(sizes: list[int], shared: int | None, bucket: int | None, replicas: int) -> tuple[list[int], int]:
    """Where Megatron-Core's buffer begins each parameter, without the padding of buckets, as it saves them; and how many there are."""
    prepare()
    import megatron.core.distributed.param_and_grad_buffer as module

    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    if shared is not None:
        parameters[shared].shared_embedding = True  # type: ignore[attr-defined]
    group = SimpleNamespace(size=lambda: replicas, rank=lambda: 0)
    sharing = SimpleNamespace(
        use_distributed_optimizer=True, pad_buckets_for_high_nccl_busbw=False, reuse_grad_buf_for_mxfp8_param_ag=False
    )
    names = {parameter: str(i) for i, parameter in enumerate(parameters)}
    groups = SimpleNamespace(tp=group, dp_cp=group)
    indices = list(range(len(sizes)))
    told: Any = (sharing, torch.float32, torch.float32, parameters, group, bucket, names, 1.0, indices, False, groups)
    with patch.object(module, "log_on_each_pipeline_stage"):  # which wants real groups
        buffer: Any = module._ParamAndGradBuffer(*told)
    before = [0]
    for held in buffer.buckets:
        before.append(before[-1] + held.numel_unpadded)
    starts = []
    for parameter in parameters:
        start, _, number = buffer.param_index_map[parameter]
        starts.append(start - buffer.bucket_indices[number][0] + before[number])
    return starts, before[-1]


@settings(max_examples=150, deadline=None)
@given(SIZES, st.none() | st.integers(0, 7), st.none() | st.integers(1, 900), st.sampled_from([1, 2, 3, 8]))
def test_parameters_stand_where_megatron_core_puts_them(
    sizes: list[int], shared: int | None, bucket: int | None, replicas: int
) -> None:
    shared = None if shared is None or shared >= len(sizes) else shared
    members = [Member(0, str(i), (n,), BF16, True, False, i == shared) for i, n in enumerate(sizes)]
    (ours,) = buffers(members, bucket)
    starts = {member.name: at for member, at in ours.places}
    assert ([starts[str(i)] for i in range(len(sizes))], ours.numel) == in_the_file(sizes, shared, bucket, replicas)


@pytest.mark.parametrize(
    ("args", "pp", "size"),
    [
        ({}, 0, None),
        ({"overlap_grad_reduce": False, "ddp_bucket_size": 7}, 0, None),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": None, "data_parallel_size": 8}, 0, 40_000_000),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": None, "data_parallel_size": 64}, 0, 64_000_000),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 7}, 0, 7),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 7}, 1, None),
    ],
)
def test_buckets_are_cut_where_communication_overlaps(args: dict[str, object], pp: int, size: int | None) -> None:
    assert bucket_size(args, pp) == size


@pytest.mark.parametrize(
    ("args", "buckets"),
    [
        ({}, None),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 1}, 1),
        ({"overlap_grad_reduce": True, "ddp_bucket_size": 9000}, 9000),
        ({"overlap_grad_reduce": True, "data_parallel_size": 64}, 7000),  # 64 in the source, 1 in what is written
    ],
    ids=["one", "each", "some", "by the number of replicas"],
)
def test_written_buffers_are_those_of_the_args_beside_them(
    args: dict[str, object],
    buckets: int | None,
    hf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model whose sizes are no multiples of the alignment: as Megatron-Core lays them out, and as we read them."""
    monkeypatch.setattr(f"{buffers.__module__}.SMALLEST_BUCKET", 1)
    monkeypatch.setattr(f"{buffers.__module__}.BUCKET_PER_REPLICA", 7000)
    wishes: Any = {"vocab_divisor": 1, "saver_options": {"distributed_optimizer": True, "transformer_impl": "local"}}
    source = hf("llama", hidden_size=60, head_dim=16)
    out = in_training(source, args, tmp_path / "out", saver="mcore", **wishes)
    (folder,) = out.glob("iter_*/mp_rank_00")
    model = torch.load(folder / RANK_FILE, weights_only=False)["model"]
    sizes = [weight.numel() for weight in model.values() if isinstance(weight, torch.Tensor)]
    (world,) = torch.load(folder / FLAT_FILE)[0].values()
    assert world["numel_unpadded"] == in_the_file(sizes, None, buckets, 1)[1]
    (held,) = stored(out).ranks.values()
    assert {key.slot for key in held} == {"param", EXP_AVG, EXP_AVG_SQ}
    for key, tensor in held.items():
        np.testing.assert_array_equal(tensor.numpy(), model[key.name].numpy(), str(key))
