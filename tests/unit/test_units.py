"""Work units: together they are the plan, siblings go together, and what is done is not handed out again."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest

from ckptconv.executor.units import CHECKS, CHUNK, PIECE, Batch, Claim, Compare, Group, header_of, pieces, units
from ckptconv.plan import File, Plan, Segment
from ckptconv.tensor import Tensor
from ckptconv.testing.plans import carve, mixed_bytes, mixed_plan, plain_file, summed_file, write_source

Spans = set[tuple[int, int]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return mixed_plan(write_source(tmp_path_factory.mktemp("units") / "s", mixed_bytes(20)), 20)


def claims_of(plan: Plan, unit: Batch | Group | Compare) -> list[Claim]:
    if isinstance(unit, Compare):
        return [Claim(CHECKS, unit.check, unit.lo // PIECE)]
    if isinstance(unit, Group):
        return [Claim(f, s, unit.lo // PIECE) for f, s in unit.members]
    segments = plan.files[unit.file].segments
    return [Claim(unit.file, s, 0) for s in unit.segments if isinstance(segments[s].body, Tensor)]


def all_claims(plan: Plan) -> set[Claim]:
    found = {
        Claim(f, s, piece)
        for f, file in enumerate(plan.files)
        if not file.final
        for s, segment in enumerate(file.segments)
        if isinstance(segment.body, Tensor)
        for piece, _, _ in pieces(segment.nbytes)
    }
    return found | {Claim(CHECKS, c, p) for c, check in enumerate(plan.checks) for p, _, _ in pieces(check.kept.nbytes)}


def test_units_claim_each_piece_once(plan: Plan) -> None:
    claims = [claim for unit in units(plan) for claim in claims_of(plan, unit)]
    assert len(claims) == len(set(claims))
    assert set(claims) == all_claims(plan)
    assert any(claim.piece for claim in claims)


def test_units_leave_out_what_is_done(plan: Plan) -> None:
    done = set(random.Random(0).sample(sorted(all_claims(plan)), 60))
    left = {claim for unit in units(plan, done) for claim in claims_of(plan, unit)}
    assert left >= all_claims(plan) - done
    again = left & done
    assert all(
        plan.files[claim.file].segments[claim.segment].nbytes <= CHUNK for claim in again
    )  # a batch goes as a whole
    assert units(plan, all_claims(plan)) == []


def test_units_are_plain_data_in_source_order(plan: Plan) -> None:
    work = units(plan)
    assert pickle.loads(pickle.dumps(work)) == work
    assert [unit.where for unit in work] == sorted(unit.where for unit in work)
    assert units(pickle.loads(pickle.dumps(plan))) == work


def test_units_ranks_of_a_row_parallel_weight_are_one_group(tmp_path: Path) -> None:
    whole = carve(tmp_path / "s", [(2048, 2048)])[0]
    ranks = [whole.narrow(1, 512 * r, 512 * r + 512) for r in range(4)]
    plan = Plan(tuple(plain_file(f"{r}", [("w", rank)]) for r, rank in enumerate(ranks)))
    (group,) = units(plan)
    assert isinstance(group, Group)
    assert group.members == ((0, 1), (1, 1), (2, 1), (3, 1))


def test_units_ranks_of_a_column_parallel_weight_are_apart(tmp_path: Path) -> None:
    whole = carve(tmp_path / "s", [(2048, 2048)])[0]
    plan = Plan(tuple(plain_file(f"{r}", [("w", whole.narrow(0, 512 * r, 512 * r + 512))]) for r in range(4)))
    assert [unit.members for unit in units(plan) if isinstance(unit, Group)] == [((r, 1),) for r in range(4)]


def test_units_small_segments_are_written_together(tmp_path: Path) -> None:
    tensors = [(f"t{i}", t) for i, t in enumerate(carve(tmp_path / "s", [(32, 1024)] * 40))]
    for file in (plain_file("a", tensors), summed_file("a", tensors)):
        work = units(Plan((file,)))
        assert all(isinstance(unit, Batch) for unit in work)
        assert len(work) == -(-file.size // CHUNK)
        for unit in work:
            assert isinstance(unit, Batch)
            assert unit.hi - unit.lo <= CHUNK
            inside = set(unit.segments)
            assert all(s + 1 in inside for s in inside if header_of(file.segments[s], s))


def test_units_without_tensors_are_none() -> None:
    plan = Plan((File("a", 3, (Segment(0, b"abc"),)), File("b", 0, ())))
    assert units(plan) == []


def test_pieces_of_nothing_are_one() -> None:
    assert list(pieces(0)) == [(0, 0, 0)]
    assert list(pieces(PIECE)) == [(0, 0, PIECE)]
    assert list(pieces(PIECE + 2)) == [(0, 0, PIECE), (1, PIECE, PIECE + 2)]
