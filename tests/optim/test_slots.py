"""Every slot is that of the parameter which Megatron-Core itself says, and goes where its weight goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, STATE, Checkpoint, Key
from ckptconv.errors import ConfigError, FormatError
from tests.judge.ranks import Layout
from tests.optim.conftest import RUNS, Get
from tests.optim.convert import Array, at, converted, edited, moved, slots, stored
from tests.optim.rank_runs import FLAT_FILE, NAMED, RANK_FILE

FILED = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
ROWS, COLUMNS, HALVES = 0, 1, 2  # how tensor ranks cut a matrix: in rows, in columns, in rows of each of two halves
CUTS = {
    "word_embeddings": ROWS, "output_layer": ROWS, "linear_qkv": ROWS, "linear_proj": COLUMNS, "linear_fc2": COLUMNS, "linear_fc1": HALVES,
}  # fmt: skip


def whole(name: str, parts: list[Array]) -> Array:
    """What tensor ranks hold of one parameter, put together by the rules of Megatron's layers."""
    cut = next((how for word, how in CUTS.items() if word in name), None)
    if cut is None or parts[0].ndim == 1:
        assert all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0]
    if cut == HALVES:
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([h[0] for h in halves] + [h[1] for h in halves])
    return np.concatenate(parts, cut)


def globally(name: str, first: int) -> str:
    """A name with the number that its layer has in the model."""
    words = name.split(".")
    if "layers" in words:
        at = words.index("layers") + 1
        words[at] = str(int(words[at]) + first)
    return ".".join(words)


def model_slots(folder: Path) -> dict[Key, Array]:
    """The slots of a dense model as whole tensors under global names, from what each rank is read to hold."""
    held = stored(folder)
    found: dict[Key, list[Array]] = {}
    for rank, tensors in sorted(held.ranks.items(), key=lambda item: item[0].tp):
        first = next(iter(held.topology.stage(rank).layers), 0)
        for key, tensor in tensors.items():
            if key.slot != "param":
                found.setdefault(Key(globally(key.name, first), key.slot), []).append(np.asarray(tensor.numpy()))
    return {key: whole(key.name, parts) for key, parts in found.items()}


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", [name for name, (*_, distributed) in RUNS.items() if not distributed])
def test_a_slot_is_that_of_its_parameter(name: str, trained: Get) -> None:
    """Held against the optimizer's own objects, by the name of the parameter they belong to."""
    there = trained(name)
    for place, held in slots(there.folder).items():
        (path,) = there.folder.glob(f"iter_*/{place}/{NAMED}")
        theirs = torch.load(path)
        wanted = {f"model.{key.name}" for key in held}
        assert wanted == theirs.keys()
        assert {key.slot for key in held} == set(STATE if there.run.bf16 else STATE[1:])
        for key, value in held.items():
            np.testing.assert_array_equal(value, theirs[f"model.{key.name}"][key.slot].numpy(), str(key))


def test_flat_buffers_are_those_that_megatron_core_describes(golden: Path) -> None:
    """Its own account of which elements are whose, beside files that it wrote."""
    told = json.loads((golden / "buffer_layout_rank0.json").read_text())["buffer"]
    flat = torch.load(golden / "iter_0000002" / "mp_rank_00" / FLAT_FILE)[0][torch.bfloat16, torch.float32]
    held = slots(golden)["mp_rank_00"]
    assert {key.name for key in held} == told.keys()
    for name, (start, stop, _) in told.items():
        for slot in STATE:
            np.testing.assert_array_equal(held[Key(name, slot)].reshape(-1), flat[FILED[slot]][start:stop].numpy())


MOVES = [Layout(pp=4), Layout(tp=2), Layout(), Layout(tp=2, pp=2), Layout(pp=2, vpp=2)]


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("flat", [False, True], ids=["lists", "flat"])
@pytest.mark.parametrize("layout", MOVES, ids=lambda layout: layout.name)
def test_slots_are_cut_as_their_weights(layout: Layout, flat: bool, trained: Get, tmp_path: Path) -> None:
    there = trained("lists")
    before = model_slots(there.folder)
    after = model_slots(moved(there, at(there, layout, distributed=flat), tmp_path / "out"))
    assert after.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, str(key))


def leaves(value: object, path: str = "") -> dict[str, object]:
    """What torch reads, by path."""
    if isinstance(value, dict):
        return {p: leaf for k, v in value.items() for p, leaf in leaves(v, f"{path}/{k}").items()}
    if isinstance(value, list | tuple):
        return {p: leaf for i, v in enumerate(value) for p, leaf in leaves(v, f"{path}/{i}").items()}
    return {path: value}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b  # type: ignore[arg-type]


def test_the_same_layout_gives_the_same_files(golden: Path, tmp_path: Path) -> None:
    """Param groups, scheduler, generators and all; args and the count of operations are ours or left out."""
    out = converted(golden, tmp_path / "out")
    files = sorted(path.relative_to(golden) for path in golden.rglob("*.pt"))
    assert [path.name for path in files] == [FLAT_FILE, RANK_FILE] * 2
    for file in files:
        theirs, ours = (leaves(torch.load(folder / file, weights_only=False)) for folder in (golden, out))
        left = {"/args", "/num_floating_point_operations_so_far"}
        assert theirs.keys() - left == ours.keys() - left
        assert [path for path in ours.keys() - left if not same(ours[path], theirs[path])] == []


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
def test_each_process_files_what_it_has_gathered(trained: Get, tmp_path: Path) -> None:
    """Of parameters other than experts the first of their replicas alone, and those of experts likewise."""
    there = trained("experts")
    out = moved(there, there.run, tmp_path / "out")
    files = sorted(path.relative_to(there.folder) for path in there.folder.rglob(FLAT_FILE))
    assert len(files) == 4
    for file in files:
        theirs, ours = (leaves(torch.load(folder / file)) for folder in (there.folder, out))
        assert theirs.keys() == ours.keys()
        assert [path for path in ours if not same(ours[path], theirs[path])] == []


@pytest.mark.ranks
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", RUNS)
def test_a_distributed_checkpoint_gives_the_rank_files_of_the_same_state(
    name: str, trained: Get, tmp_path: Path
) -> None:
    """Both saved by Megatron-Core in one go: tensors, numbers, groups, schedule."""
    there = trained(name)
    out = moved(there, there.run, tmp_path / "out", there.distributed, saver="mcore")
    for path in sorted(there.folder.rglob("*.pt")):
        if path.name == NAMED:
            continue
        theirs, ours = (
            leaves(torch.load(file, weights_only=False)) for file in (path, out / path.relative_to(there.folder))
        )
        compared = {
            key for key in ours if key != "/args" and not key.startswith("/rng_state")
        }  # these runs' rank files have none
        assert compared == theirs.keys() - {"/args"}
        assert [key for key in compared if not same(ours[key], theirs[key])] == []


def read(folder: Path, place: str = "mp_rank_00", file: str = RANK_FILE) -> Any:
    return torch.load(folder / "iter_0000002" / place / file, weights_only=False)


def test_generators_stay_with_their_processes_alone(golden: Path, tmp_path: Path) -> None:
    kept = read(converted(golden, tmp_path / "flat", saver_options={"distributed_optimizer": False}))
    assert "rng_state" in kept
    assert kept["args"].no_save_rng is False
    assert kept["args"].use_distributed_optimizer is False
    other = read(converted(golden, tmp_path / "other", tp=1))
    (note,) = json.loads((tmp_path / "other" / "ckptconv.json").read_text())["about"]["format_notes"]
    assert "--no-load-rng" in note
    assert "rng_state" not in other
    assert other["args"].no_save_rng is True
    assert other["args"].no_save_optim is False
    assert other["args"].use_distributed_optimizer is True
    assert other["opt_param_scheduler"] == kept["opt_param_scheduler"]


def test_another_dtype_is_rounded_from_the_master_or_becomes_one(golden: Path, tmp_path: Path) -> None:
    full = converted(golden, tmp_path / "full", dtype="fp32", saver_options={"distributed_optimizer": False})
    saved, masters = read(full), slots(golden)["mp_rank_00"]
    assert set(saved["optimizer"]) == {"state", "param_groups"}
    for name, weight in saved["model"].items():
        if not name.endswith("_extra_state"):
            np.testing.assert_array_equal(weight.numpy(), masters[Key(name, "master")], name)
    back = converted(full, tmp_path / "back", dtype="bf16", saver_options={"distributed_optimizer": True})
    for place in ("mp_rank_00", "mp_rank_01"):
        theirs, ours = (leaves(read(folder, place, FLAT_FILE)) for folder in (golden, back))
        assert theirs.keys() == ours.keys()
        assert all(same(theirs[path], ours[path]) for path in theirs)


@pytest.mark.parametrize(
    ("saver", "distributed"), [("mcore", False), ("mcore", True), ("mcore-dist", False), ("mcore-dist", True)]
)
def test_before_the_first_update_weights_of_fp32_become_masters(
    saver: str, distributed: bool, golden: Path, tmp_path: Path
) -> None:
    """A run in fp32 that has not begun holds the weights alone; nothing of them is lost in bf16."""
    full = converted(golden, tmp_path / "full", dtype="fp32", tp=1, saver_options={"distributed_optimizer": False})
    (path,) = full.rglob(RANK_FILE)
    saved = torch.load(path, weights_only=False)
    saved["optimizer"]["state"].clear()
    torch.save(saved, path)
    options = {"distributed_optimizer": distributed}
    out = converted(full, tmp_path / "out", dtype="bf16", saver=saver, saver_options=options)
    exact, held = canonicalize(stored(full)).tensors, canonicalize(stored(out)).tensors
    moments = () if (saver, distributed) == ("mcore", False) else (EXP_AVG, EXP_AVG_SQ)  # these lists begin empty
    assert {key.slot for key in exact} == {"param"}
    assert held.keys() == {Key(name, slot) for name, _ in exact for slot in ("param", MASTER, *moments)}
    for name, _ in exact:
        np.testing.assert_array_equal(held[Key(name, MASTER)].numpy(), exact[Key(name)].numpy(), name)
        assert not any(held[Key(name, slot)].numpy().any() for slot in moments)


@pytest.fixture
def uncounted(golden: Path, tmp_path: Path) -> Path:
    """Lists with moments of every parameter after 0 updates, as a run holds them that was taken up without its count."""
    folder = converted(golden, tmp_path / "uncounted", saver_options={"distributed_optimizer": False})
    for path in folder.rglob(RANK_FILE):
        saved = torch.load(path, weights_only=False)
        for held in saved["optimizer"]["optimizer"]["state"].values():
            held["step"] *= 0
        torch.save(saved, path)
    return folder


@pytest.mark.parametrize(
    ("saver", "distributed"), [("mcore", False), ("mcore", True), ("mcore-dist", False), ("mcore-dist", True)]
)
def test_moments_are_kept_after_no_update(saver: str, distributed: bool, uncounted: Path, tmp_path: Path) -> None:
    out = converted(uncounted, tmp_path / "out", saver=saver, saver_options={"distributed_optimizer": distributed})
    before, after = canonicalize(stored(uncounted)).tensors, canonicalize(stored(out)).tensors
    assert after.keys() == before.keys()
    assert {key.slot for key in after} == {"param", *STATE}
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key].numpy(), tensor.numpy(), str(key))


def test_moments_of_some_ranks_alone_are_half_a_state(uncounted: Path, tmp_path: Path) -> None:
    path = next(uncounted.rglob("mp_rank_01/" + RANK_FILE))
    saved = torch.load(path, weights_only=False)
    saved["optimizer"]["optimizer"]["state"].clear()
    torch.save(saved, path)
    with pytest.raises(FormatError, match="no rank has the state of 27 parameters"):
        converted(uncounted, tmp_path / "out", tp=1)


def test_one_moment_without_the_other_is_half_a_state(uncounted: Path, tmp_path: Path) -> None:
    """Also after 0 updates, where both may be missing."""

    def one(whole: Checkpoint) -> Checkpoint:
        return replace(whole, tensors={key: t for key, t in whole.tensors.items() if key.slot != EXP_AVG_SQ})

    with pytest.raises(ConfigError, match="has no exp_avg_sq"):
        edited(uncounted, one, tmp_path / "out")


def groups_of(folder: Path) -> list[list[dict[str, Any]]]:
    """The settings of each file's param groups, as torch reads them: without the numbers and counts, which are of the form."""
    found = []
    for path in sorted([*folder.rglob(RANK_FILE), *folder.rglob("common.pt")]):
        optimizer = torch.load(path, weights_only=False)["optimizer"]
        groups = optimizer.get("optimizer", optimizer)["param_groups"]
        settings = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in groups]
        found.append(sorted(settings, key=lambda group: -group["wd_mult"]))
    return found


@pytest.mark.parametrize(
    ("saver", "distributed"), [("mcore", False), ("mcore", True), ("mcore-dist", False), ("mcore-dist", True)]
)
def test_settings_of_param_groups_are_those_of_the_source(
    saver: str, distributed: bool, golden: Path, tmp_path: Path
) -> None:
    """At another layout, from the forms that a run may have; with values that nobody has by default."""
    own = {
        "lr": 0.123,
        "betas": (0.7, 0.8),
        "eps": 3e-7,
        "max_lr": 0.5,
        "min_lr": 0.25,
        "a setting of one's own": "kept",
    }
    shutil.copytree(golden, source := tmp_path / "source")
    for path in source.rglob(RANK_FILE):
        path.chmod(0o600)
        saved = torch.load(path, weights_only=False)
        for group in saved["optimizer"]["optimizer"]["param_groups"]:
            group.update(own, weight_decay=0.07 * group["wd_mult"])
        torch.save(saved, path)
    (expected, _) = groups_of(source)
    assert [group["weight_decay"] for group in expected] == [0.07, 0.0]
    options = {"distributed_optimizer": distributed, "transformer_impl": "local"}
    layout = {"tp": 1, "pp": 2} if saver == "mcore" else {}
    out = converted(source, tmp_path / "out", saver=saver, saver_options=options, **layout)
    assert groups_of(out) == [expected] * (2 if saver == "mcore" else 1)
    back = converted(out, tmp_path / "back", saver="mcore", tp=2, pp=1, saver_options=options)
    assert groups_of(back) == [expected] * 2


def test_rows_of_padding_have_no_moments(golden: Path, tmp_path: Path) -> None:
    """As if they had never been trained; their weights are copies of the last row, masters too."""
    out = converted(golden, tmp_path / "out", tp=1, vocab_size=160, vocab_divisor=320)
    held = slots(out)["mp_rank_00"]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        for slot, filled in (("exp_avg", 0.0), ("exp_avg_sq", 0.0), ("master", held[Key(name, "master")][159])):
            assert (held[Key(name, slot)][160:] == filled).all()
        assert held[Key(name, "exp_avg")][:160].any()


def test_legacy_models_keep_theirs(golden: Path, tmp_path: Path) -> None:
    legacy = converted(golden, tmp_path / "legacy", saver="legacy", tp=1)
    back = converted(legacy, tmp_path / "back", saver="mcore", tp=2, saver_options={"transformer_impl": "local"})
    for place, held in slots(golden).items():
        again = slots(back)[place]
        assert again.keys() == held.keys()
        assert all(np.array_equal(again[key], value) for key, value in held.items())


def test_buffers_that_no_process_has_are_missed(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(golden, folder)
    for path in folder.rglob(FLAT_FILE):
        path.chmod(0o600)
        path.unlink()
    with pytest.raises(FormatError, match="no rank has the state of 27 parameters"):
        converted(folder, tmp_path / "out", tp=1)
