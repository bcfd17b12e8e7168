"""Parts of the trainer on their own: schedules against Megatron-Core's, the configuration, the data, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from ckptconv.trainer import data
from ckptconv.trainer.__main__ import main
from ckptconv.trainer.config import Config, ModelConfig, VisionConfig, read
from ckptconv.trainer.optimizer import Scheduler
from ckptconv.trainer.pipeline import order
from ckptconv.trainer.plot import draw
from ckptconv.trainer.run import History
from tests.judge.patches import prepare
from tests.trainer.runs import TUNING


class Members:
    """Stands in for an optimizer: two groups, of which one does not decay."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]
        self.members = [self]
        self.groups = self.param_groups


def test_learning_rates_are_those_of_megatrons_scheduler() -> None:
    prepare()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config = Config().but(warmup=16, decay=100)
    t, ours, theirs = config.training, Members(), Members()
    scheduler = Scheduler(t, ours)  # type: ignore[arg-type]
    judge = OptimizerParamScheduler(
        theirs, 0.0, t.lr, t.min_lr, t.warmup, t.decay, "cosine", t.weight_decay, t.weight_decay, t.decay, "constant"
    )
    for _ in range(40):
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
        assert [g["weight_decay"] for g in ours.param_groups] == [g["weight_decay"] for g in theirs.param_groups]
        assert scheduler.state == judge.state_dict()
        scheduler.advance(3)
        judge.step(3)


def test_interleaved_order_is_that_of_megatrons_table() -> None:
    prepare()
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    stages, batches, chunks = 2, 4, 3
    table = get_schedule_table(batches, chunks, stages)
    ops = order(stages, 0, batches, chunks)
    assert [(op.batch, op.chunk) for op in ops if op.forward] == table
    assert [(op.batch, op.chunk) for op in ops if not op.forward] == [(b, chunks - 1 - c) for b, c in table]


@pytest.mark.parametrize(("stages", "rank", "held"), [(4, 0, 4), (4, 3, 1), (1, 0, 1)])
def test_1f1b_keeps_no_more_micro_batches_than_stages_follow(stages: int, rank: int, held: int) -> None:
    most = now = 0
    for op in order(stages, rank, 8, 1):
        now += 1 if op.forward else -1
        most = max(most, now)
    assert (most, now) == (held, 0)


def test_a_sample_is_a_function_of_its_number() -> None:
    first, again = (data.batch(TUNING, [5, 6]) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["images"][0], first["images"][1])


def test_only_the_answer_to_a_question_counts() -> None:
    row = {key: value[0] for key, value in data.batch(TUNING, [0]).items()}
    said = bytes(row["tokens"].tolist()).rstrip(b"\0").decode()
    asked = said.index("? ") + 2
    counted = row["labels"][row["loss_mask"] > 0]
    assert bytes(counted.tolist()).decode() == said[asked:]
    assert said.endswith("\n")


@pytest.mark.parametrize(
    ("config", "world", "said"),
    [
        (Config().at(tp=3), 3, "kv_heads 4 are no multiple of tp 3"),
        (Config().at(pp=2), 3, "3 processes are no multiple"),
        (Config().at(vpp=2), 1, "vpp needs pp"),
        (Config().at(ep=2), 2, "experts 0 are no multiple of ep 2"),
        (Config().but(precision="fp16"), 1, "precision is 'fp16'"),
        (Config(vision=VisionConfig()), 1, "data is 'text'"),
        (Config().but(global_batch=9), 1, "global_batch 9 is no multiple"),
    ],
)
def test_a_run_that_cannot_be_is_refused_with_the_reason(config: Config, world: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config.check(world)


def test_a_file_of_settings_is_read_and_a_misspelt_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nlayers = 8\n[layout]\npp = 2\n[training]\nfreeze = ["vision_model."]\n')
    assert read(path) == Config(ModelConfig(layers=8)).at(pp=2).but(freeze=("vision_model.",))
    path.write_text("[model]\nlayer = 8\n")
    with pytest.raises(ValueError, match="unknown settings \\['layer'\\]; known are layers"):
        read(path)


def test_a_curve_falls_in_the_picture_as_it_does_in_numbers(tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    draw(History(3, losses=[5.0, 4.0, 3.5, 3.25]), path)
    picture = matplotlib.image.imread(path)[..., :3]
    line = (picture.max(-1) - picture.min(-1) > 0.2).nonzero()  # all else is grey
    rows = [line[0][line[1] == column].mean() for column in sorted(set(line[1]))]
    assert len(rows) > picture.shape[1] / 2
    assert rows == sorted(rows)
    falls = [rows[len(rows) * n // 3 - (n == 3)] for n in range(4)]
    assert falls[1] - falls[0] > falls[2] - falls[1] > falls[3] - falls[2] > 0


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
def test_the_command_line_trains_saves_goes_on_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["trainer", "--pp", "2", *options])
        main()
        return capfd.readouterr().out.splitlines()

    there = str(tmp_path / "saved")
    whole = run("--steps", "3", "--plot", str(tmp_path / "loss.png"))
    assert [line.split()[:3] for line in whole] == [["step", str(n), "loss"] for n in (1, 2, 3)]
    assert run("--steps", "2", "--save", there) + run("--steps", "3", "--load", there) == whole
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
def test_torchrun_starts_the_ranks_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    options = ["--pp", "2", "--steps", "2"]
    usual = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ckptconv.trainer"]
    done = subprocess.run([sys.executable, *torchrun, *options], env=usual, capture_output=True, text=True, check=True)
    monkeypatch.setattr(sys, "argv", ["trainer", *options])
    main()
    assert done.stdout == capfd.readouterr().out
