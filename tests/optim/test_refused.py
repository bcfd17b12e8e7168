"""Optimizer state that is damaged, or of a kind that is not known, is refused with what was found; nothing of it is guessed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptconv.checkpoint import STATE, Checkpoint, Key
from ckptconv.errors import CkptconvError, ConfigError, FormatError
from tests.optim.conftest import Get
from tests.optim.convert import converted, edited, stored
from tests.optim.rank_runs import FLAT_FILE, RANK_FILE

Saved = dict[Any, Any]
Edit = Callable[[Saved], object]


@pytest.fixture(scope="module")
def lists(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same state by parameter number, in the form of torch's Adam."""
    options = {"distributed_optimizer": False}
    return converted(golden, tmp_path_factory.mktemp("lists") / "out", saver_options=options)


def refused(source: Path, work: Path, change: Edit, file: str = RANK_FILE, place: str = "*") -> str:
    """The message about a copy of the checkpoint with one thing changed."""
    folder = work / "edited"
    shutil.copytree(source, folder)
    for path in sorted(folder.glob(f"iter_*/{place}/{file}")):
        path.chmod(0o600)
        saved = torch.load(path, weights_only=False)
        change(saved)
        torch.save(saved, path)
    with pytest.raises(CkptconvError) as caught:
        converted(folder, work / "out", tp=1)
    assert not (work / "out").exists()
    return str(caught.value)


def inner(saved: Saved) -> Saved:
    held: Saved = saved["optimizer"]["optimizer"]
    return held


def third_group(saved: Saved) -> None:
    groups = inner(saved)["param_groups"]
    groups.append({**groups[0], "params": []})


def freeze(saved: Saved) -> None:
    inner(saved)["param_groups"][0]["params"].pop()


def other_optimizer(saved: Saved) -> None:
    for held in inner(saved)["state"].values():
        held["momentum_buffer"] = held.pop("exp_avg")


def renumber(saved: Saved) -> None:
    numbers = inner(saved)["param_groups"][0]["params"]
    numbers[0], numbers[1] = numbers[1], numbers[0]


def count_apart(saved: Saved) -> None:
    inner(saved)["state"][3]["step"] += 1


def half_a_step(saved: Saved) -> None:
    inner(saved)["state"][0]["step"] += 0.5


def nan_steps(saved: Saved) -> None:
    inner(saved)["state"][0]["step"] *= torch.nan


def endless_steps(saved: Saved) -> None:
    inner(saved)["state"][0]["step"] += torch.inf


def uncounted(saved: Saved) -> None:
    for told in (*inner(saved).get("state", {}).values(), *inner(saved)["param_groups"]):
        told.pop("step", None)


def masters_alone(saved: Saved) -> None:
    """Of FusedAdam, which counts in its groups."""
    inner(saved)["state"].clear()
    for group in inner(saved)["param_groups"]:
        group["step"] = 2


def one_master_less(saved: Saved) -> None:
    saved["optimizer"]["fp32_from_fp16_params"][1].pop()


def lose_state(saved: Saved) -> None:
    del inner(saved)["state"][2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (third_group, "3 param groups: only weight decay may tell them apart"),
        (freeze, "param group with weight decay has 17 parameters, expected 18"),
        (other_optimizer, "has step, exp_avg_sq, momentum_buffer; only Adam"),
        (renumber, r"exp_avg in the place of embedding.word_embeddings.weight has shape \(64, 32\), expected \(128, 64\)"),
        (count_apart, r"different numbers of updates: \[2, 3\]"),
        (half_a_step, "step is 2.5, expected how many updates"),
        (nan_steps, "step is nan, expected how many updates"),
        (endless_steps, "step is inf, expected how many updates"),
        (uncounted, "has moments, but no step in its param groups or beside them, expected how many updates"),
        (masters_alone, r"no rank has the state of 27 parameters:\n  pp=0 tp=0: decoder.final_layernorm.weight \[exp_avg\]"),
        (one_master_less, "has 8 master weights for 9 parameters that are not fp32"),
        (lose_state, r"parameter 2 \(decoder.layers.0.self_attention.linear_qkv.weight\) has nothing"),
        (lambda saved: inner(saved).update(param_groups={}), "param_groups: is a dict, expected a list"),
        (lambda saved: inner(saved).update(state=[]), "state: is a list, expected a dictionary"),
        (lambda saved: saved.update(optimizer=7), "optimizer: is a int, expected a dictionary"),
    ],
    ids=lambda x: "" if isinstance(x, str) else x.__name__,
)  # fmt: skip
def test_lists(change: Edit, message: str, lists: Path, tmp_path: Path) -> None:
    assert re.search(message, refused(lists, tmp_path, change))


def other_rate(saved: Saved) -> None:
    inner(saved)["param_groups"][0]["lr"] = 0.5


def other_schedule(saved: Saved) -> None:
    saved["opt_param_scheduler"]["num_steps"] += 1


def scale_gradients(saved: Saved) -> None:
    saved["optimizer"]["grad_scaler"] = {"scale": torch.tensor([1024.0]), "growth_tracker": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_rate, "param groups of one kind differ, here or between ranks, in lr"),
        (other_schedule, "opt_param_scheduler: is not the same on all ranks"),
        (scale_gradients, "grad_scaler is {'scale': 1024.0, 'growth_tracker': 0}, but None in"),
        (uncounted, "has moments, but no step in its param groups or beside them"),
        (lambda saved: saved.pop("optimizer"), "cannot carry over:\n  optimizer"),
    ],
    ids=["learning rate", "scheduler", "scale of gradients", "no count on one rank", "nothing on one rank"],
)
def test_ranks_that_say_other_things(change: Edit, message: str, golden: Path, tmp_path: Path) -> None:
    assert message in refused(golden, tmp_path, change, place="mp_rank_01")


def flat(saved: Saved) -> Saved:
    ((_, world),) = saved[0].items()
    held: Saved = world
    return held


def shorten(saved: Saved) -> None:
    flat(saved)["exp_avg"] = flat(saved)["exp_avg"][:-64]


def miscount(saved: Saved) -> None:
    flat(saved)["numel_unpadded"] += 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, "exp_avg has shape (78336,), expected (78400,)"),
        (miscount, "numel_unpadded is 78464, expected 78400 for these parameters"),
        (lambda saved: saved.pop("buckets_coalesced"), "from before Megatron-Core 0.7"),
        (lambda saved: saved.update(buckets_coalesced=1), "from before Megatron-Core 0.7"),
        (lambda saved: saved.update({1: saved[0]}), "has buffers [0, 1], expected 1"),
        (lambda saved: saved.update({0: {torch.float32: flat(saved)}}), "expected parameters of bfloat16 alone"),
        (lambda saved: flat(saved).pop("param"), "param has shape None"),
    ],
    ids=["size", "size told", "old form", "no answer", "number", "dtype", "no masters"],
)
def test_flat_buffers(change: Edit, message: str, golden: Path, tmp_path: Path) -> None:
    assert message in refused(golden, tmp_path, change, FLAT_FILE)


def exchange(saved: Saved) -> None:
    """Two parameters of one shape, all that there is of them."""
    numbers, state = inner(saved)["param_groups"][0]["params"], inner(saved)["state"]
    masters = saved["optimizer"]["fp32_from_fp16_params"][0]
    a, b = 1, 5
    assert masters[a].shape == masters[b].shape
    masters[a], masters[b] = masters[b], masters[a]
    state[numbers[a]], state[numbers[b]] = state[numbers[b]], state[numbers[a]]


def off_by_one(saved: Saved) -> None:
    for tensor in ("param", "exp_avg", "exp_avg_sq"):
        flat(saved)[tensor] = torch.roll(flat(saved)[tensor], 1)


def test_the_state_twice(lists: Path, golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(lists, folder)
    (flat,), (rank, *_) = (
        golden.glob(f"iter_*/mp_rank_00/{FLAT_FILE}"),
        sorted(folder.glob(f"iter_*/mp_rank_00/{RANK_FILE}")),
    )
    shutil.copy(flat, rank.parent)
    with pytest.raises(FormatError, match="which has the whole optimizer state itself"):
        converted(folder, tmp_path / "out", tp=1)


def test_parameters_numbered_otherwise_are_found_by_their_weights(lists: Path, golden: Path, tmp_path: Path) -> None:
    """Weights are rounded master weights, or the order is not the one that is taken for granted."""
    for work, source, change, file in (("a", lists, exchange, RANK_FILE), ("b", golden, off_by_one, FLAT_FILE)):
        (tmp_path / work).mkdir()
        told = refused(source, tmp_path / work, change, file)
        assert "the master weight, rounded" in told


def test_hugging_face_files_have_no_place_for_it(golden: Path, tmp_path: Path) -> None:
    family: dict[str, Any] = {"family": "hf-llama", "saver_options": {"config_from_args": True}, "vocab_size": 256}
    with pytest.raises(CkptconvError, match=r"hf files of ours cannot carry over:\n  optimizer(.|\n)*--optimizer drop"):
        converted(golden, tmp_path / "out", saver="hf", **family)
    converted(golden, tmp_path / "out", saver="hf", optimizer="drop", **family)
    ranks = converted(golden, tmp_path / "ranks", optimizer="drop")
    counter, note = json.loads((ranks / "ckptconv.json").read_text())["about"]["notes"]
    assert counter == "left behind in the rank files: num_floating_point_operations_so_far"
    assert note.startswith(
        "given up (--optimizer drop): optimizer (2 param groups), learning rate scheduler, RNG state"
    )
    saved = torch.load(ranks / "iter_0000002" / "mp_rank_00" / RANK_FILE, weights_only=False)
    assert saved["args"].no_save_optim is True
    assert "optimizer" not in saved
    assert not list(ranks.rglob(FLAT_FILE))


def narrow_moments(saved: Saved) -> None:
    for held in inner(saved)["state"].values():
        held["exp_avg"] = held["exp_avg"].bfloat16()


def test_moments_of_another_dtype(lists: Path, tmp_path: Path) -> None:
    told = refused(lists, tmp_path, narrow_moments)
    assert "[exp_avg] bf16" in told


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("pp", "ep"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_lost_buffers_of_experts(pp: int, ep: int, trained: Get, tmp_path: Path) -> None:
    """Names count from a process's first layer and expert, so the others have the like."""
    folder = tmp_path / "lost"
    shutil.copytree(trained("experts").folder, folder)
    (path,) = folder.glob(f"iter_*/mp_rank_00_{pp:03}_{ep:03}/{FLAT_FILE}")
    path.unlink()
    with pytest.raises(FormatError, match=rf"no rank has the state(.|\n)*pp={pp} etp=0 ep={ep}: .*local_experts"):
        stored(folder)


@pytest.mark.parametrize(
    ("saver", "options"),
    [
        ("mcore", {"distributed_optimizer": False}),
        ("mcore", {"distributed_optimizer": True}),
        ("mcore-dist", {"distributed_optimizer": False}),
        ("mcore-dist", {"distributed_optimizer": True}),
    ],
    ids=["lists", "flat", "plain", "distributed"],
)
@pytest.mark.parametrize("lost", STATE)
def test_what_is_not_there_is_not_written(
    lost: str, saver: str, options: dict[str, Any], golden: Path, tmp_path: Path
) -> None:
    """Neither as zeros, nor as a wider weight, nor by taking the parameter for a frozen one."""

    def without(whole: Checkpoint) -> Checkpoint:
        kept = {key: tensor for key, tensor in whole.tensors.items() if key != Key("embed.weight", lost)}
        return replace(whole, tensors=kept)

    with pytest.raises(ConfigError, match=rf"word_embeddings.weight \(bf16\) has no {lost} after 2 updates"):
        edited(golden, without, tmp_path / "out", saver=saver, saver_options=options)
