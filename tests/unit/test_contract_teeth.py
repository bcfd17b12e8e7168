"""The contract catches what it is for: formats with one fault each, and the test that must fail on them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ckptconv.checkpoint import Checkpoint, Key, Stored, Target
from ckptconv.dtypes import FP32
from ckptconv.formats import Request
from ckptconv.formats.hf import Hf, HfLoad, HfSave
from ckptconv.plan import File, Plan, Segment
from ckptconv.tensor import Tensor
from ckptconv.testing import FormatContract
from ckptconv.testing.checkpoints import WEIGHTS
from ckptconv.testing.workbench import Bench
from ckptconv.topology import Rank, Topology
from ckptconv.values import Cast


class ReadsToLoad(Hf):
    def load(self, path: Path, options: HfLoad, request: Request) -> Stored:
        (path / WEIGHTS).read_bytes()
        return super().load(path, options, request)


class ReadsToSave(Hf):
    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        next(iter(stored.ranks[Rank()].values())).numpy()
        return super().save(stored, options, request)


class TakesAll(Hf):
    def sniff(self, path: Path) -> bool:
        return True


class SaysWhen(Hf):
    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        plan = super().save(stored, options, request)
        stamp = uuid.uuid4().bytes
        return replace(plan, files=(*plan.files, File("stamp", len(stamp), (Segment(0, stamp),))))


class SkipsUnknown(Hf):
    def load(self, path: Path, options: HfLoad, request: Request) -> Stored:
        stored = super().load(path, options, request)
        tensors = {k: t for k, t in stored.ranks[Rank()].items() if "stray" not in k.name}
        return replace(stored, ranks={Rank(): tensors})


class LosesState(Hf):
    def target(self, checkpoint: Checkpoint, topology: Topology, options: HfSave, request: Request) -> Target:
        params = {k: t for k, t in checkpoint.tensors.items() if k.slot == "param"}
        return super().target(replace(checkpoint, tensors=params), topology, options, request)

    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        params = {k: t for k, t in stored.ranks[Rank()].items() if k.slot == "param"}
        return super().save(replace(stored, ranks={Rank(): params}), options, request)


class Widens(Hf):
    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        wide = {k: t.map(Cast(t.dtype, FP32), FP32) for k, t in stored.ranks[Rank()].items()}
        return super().save(replace(stored, ranks={Rank(): wide}), options, request)


class Swaps(Hf):
    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        names = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
        tensors: dict[Key, Tensor] = dict(stored.ranks[Rank()])
        k, v = (tensors[Key(name)] for name in names)
        return super().save(
            replace(stored, ranks={Rank(): {**tensors, Key(names[0]): v, Key(names[1]): k}}), options, request
        )


class LeavesGap(Hf):
    def save(self, stored: Stored, options: HfSave, request: Request) -> Plan:
        plan = super().save(stored, options, request)
        first = plan.files[0]
        cut = replace(first, segments=(*first.segments[:2], *first.segments[3:]))
        return replace(plan, files=(cut, *plan.files[1:]))


@dataclass(frozen=True, slots=True)
class Mute(HfSave):
    secret: int = 0


class HidesOption(Hf):
    Save = Mute


class TripsOver(Hf):
    def load(self, path: Path, options: HfLoad, request: Request) -> Stored:
        if (path / WEIGHTS).stat().st_size < 1000:
            raise KeyError("weight_map")
        return super().load(path, options, request)


Test = Callable[[FormatContract, Bench], None]
FAULTS: list[tuple[Hf, Test]] = [
    (ReadsToLoad(), lambda c, b: c.test_loading_a_large_model_reads_headers_only(b)),
    (ReadsToSave(), lambda c, b: c.test_weights_are_not_read_to_plan(b, {})),
    (TakesAll(), lambda c, b: c.test_nothing_else_is_recognised(b)),
    (TakesAll(), lambda c, b: c.test_folders_of_other_formats_are_not_recognised(b)),
    (SaysWhen(), lambda c, b: c.test_same_bytes_from_another_place(b, "llama")),
    (SaysWhen(), lambda c, b: c.test_same_plan_twice_and_through_pickle(b, {})),
    (SkipsUnknown(), lambda c, b: c.test_unexpected_tensor_is_refused_and_named(b)),
    (LosesState(), lambda c, b: c.test_optimizer_state_is_kept_or_refused(b)),
    (Widens(), lambda c, b: c.test_every_dtype_is_kept(b, "bf16")),
    (Swaps(), lambda c, b: c.test_round_trip_gives_the_same_model(b, "llama", {})),
    (LeavesGap(), lambda c, b: c.test_segments_tile_every_file(b, "llama", {})),
    (LeavesGap(), lambda c, b: c.test_every_stored_byte_is_in_the_plan(b, {})),
    (HidesOption(), lambda c, b: c.test_every_option_has_a_default_and_a_help_text()),
    (TripsOver(), lambda c, b: c.test_truncated_weight_file_is_refused(b, "nothing")),
]


@pytest.mark.parametrize(("fault", "test"), FAULTS, ids=[type(fault).__name__ for fault, _ in FAULTS])
def test_faulty_format_fails_its_contract(fault: Hf, test: Test, tmp_path: Path) -> None:
    contract = type("Contract", (FormatContract,), {"format": fault})()
    with pytest.raises((AssertionError, KeyError, OSError, pytest.fail.Exception)):
        test(contract, Bench(fault, tmp_path))


@pytest.mark.parametrize("test", [test for _, test in FAULTS])
def test_sound_format_keeps_it(test: Test, tmp_path: Path) -> None:
    """The same tests with nothing wrong: it is the fault that makes them fail."""
    contract: Any = type("Contract", (FormatContract,), {"format": Hf()})()
    test(contract, Bench(Hf(), tmp_path))
