"""Our files are made as Megatron-Core's own of the same model: every name, kind, dtype, shape and chunk (tests/trainer/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckptconv.trainer.config import Config, ModelConfig
from ckptconv.trainer.launch import launch
from ckptconv.trainer.optimizer import layout
from ckptconv.trainer.parallel import weight
from ckptconv.trainer.run import train
from tests.judge.patches import prepare
from tests.trainer import trees

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("ranks")]
MODEL = ModelConfig(layers=4, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=256, seq=16)
RUN = Config(MODEL).but(precision="bf16", steps=2, lr=0.1)  # far enough that no two vectors round to the same
RANK = "iter_0000002/mp_rank_00"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")

    def job() -> None:
        for kind in ("torch", "torch_dist"):
            run = RUN.but(format=kind)
            train(run.at(tp=2, pp=2), save=folder / "float16" / kind)
            train(run.at(tp=2).but(distributed_optimizer=True), save=folder / "distopt" / kind)

    launch(4, job)
    return folder


def expected(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((trees.MANIFESTS / f"{name}.json").read_text())
    return tree


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("float16", f"float16/torch/{RANK}_001/model_optim_rng.pt"),
        ("distopt", f"distopt/torch/{RANK}/model_optim_rng.pt"),
        ("distopt_flat", f"distopt/torch/{RANK}/distrib_optim.pt"),
    ],
)
def test_a_ranks_file_is_made_as_megatrons(name: str, path: str, folder: Path) -> None:
    assert as_json(trees.of_file(folder / path)) == expected(name)


@pytest.mark.parametrize("name", ["float16", "distopt"])
def test_a_distributed_checkpoint_is_made_as_megatrons(name: str, folder: Path) -> None:
    assert as_json(trees.of_folder(folder / name / "torch_dist" / "iter_0000002")) == expected(f"dist_{name}")


def test_every_field_of_args_that_megatron_wrote_is_there(folder: Path) -> None:
    found = torch.load(folder / f"distopt/torch/{RANK}/model_optim_rng.pt", weights_only=False)["args"]
    assert expected("args").keys() - vars(found).keys() == set()


def test_parameters_lie_in_the_flat_buffer_where_megatron_puts_them(folder: Path) -> None:
    """Each master, rounded, is the parameter; the places are those that Megatron's own buffer gave."""
    place = folder / f"distopt/torch/{RANK}"
    model = torch.load(place / "model_optim_rng.pt", weights_only=False)["model"]
    ((_, flat),) = torch.load(place / "distrib_optim.pt", weights_only=False)[0].items()
    places = expected("buffer")
    assert places.keys() == {name for name, tensor in model.items() if tensor is not None}
    for name, (start, end, _) in places.items():
        assert torch.equal(flat["param"][start:end].bfloat16().view(model[name].shape), model[name]), name


def test_masters_stand_in_the_order_of_megatrons_parameters(folder: Path) -> None:
    """Matrices first, then vectors, each in the order of the model; rounded, each is its parameter."""
    saved = torch.load(folder / f"float16/torch/{RANK}_001/model_optim_rng.pt", weights_only=False)
    order = expected("order")
    assert sorted(order, key=lambda name: int(order[name])) == list(saved["model"])
    tensors = [tensor for tensor in saved["model"].values() if tensor is not None]
    masters = saved["optimizer"]["fp32_from_fp16_params"]
    for group, found in zip(
        ([t for t in tensors if t.dim() > 1], [t for t in tensors if t.dim() == 1]), masters, strict=True
    ):
        assert all(torch.equal(m.bfloat16(), t) for m, t in zip(found, group, strict=True))


@pytest.mark.parametrize(("ranks", "shared"), [(1, None), (2, 0), (3, 4), (6, 0)])
def test_buffers_of_odd_sizes_are_laid_out_as_megatron_lays_them_out(ranks: int, shared: int | None) -> None:
    """Starts, buckets and padding, with a shared embedding at either end and copies that do not divide the alignment."""
    prepare()
    grid: Any = SimpleNamespace(config=RUN, tp=1)
    ours = [weight(grid, shape) for shape in ((50, 8), (5,), (7, 3), (64,), (131, 2))]
    for i, w in enumerate(ours):
        w.shared = w.shared_embedding = i == shared  # type: ignore[attr-defined]

    def megatrons() -> tuple[list[int], list[tuple[int, int]], int]:
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

        group = SimpleNamespace(size=lambda: ranks, rank=lambda: 0)
        config = DistributedDataParallelConfig(use_distributed_optimizer=True)
        names, numbers = {w: str(i) for i, w in enumerate(ours)}, list(range(len(ours)))
        made = _ParamAndGradBuffer(
            config, torch.float32, torch.float32, ours, group, None, names, 1.0, numbers, False,
            SimpleNamespace(tp=group, dp_cp=group),
        )  # fmt: skip
        return [made.param_index_map[w][0] for w in ours], made.bucket_indices, made.numel_unpadded

    starts, buckets = layout(ours, ranks, distributed=True)
    found = [starts[w] for w in ours], [(b.start, b.end) for b in buckets], sum(b.filled - b.start for b in buckets)
    assert found == launch(1, megatrons)[0]


def as_json(tree: dict[str, Any]) -> Any:
    return json.loads(json.dumps(tree))
