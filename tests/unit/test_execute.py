"""The executor on small plans: right bytes, what is refused before the first byte, what a failed run leaves."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ckptconv.dtypes import FP16, FP32
from ckptconv.errors import FormatError, PlanError, ReplicaError, ResumeError, ValueLossError
from ckptconv.executor import outputs
from ckptconv.executor.execute import ExecuteOptions, Report, execute
from ckptconv.executor.fingerprint import fingerprint
from ckptconv.leaves import contiguous
from ckptconv.plan import Check, File, Late, Plan, Segment
from ckptconv.source import whole
from ckptconv.tensor import Tensor
from ckptconv.testing.plans import carve, expected, mixed_bytes, mixed_plan, plain_file, read_tree, write_source
from ckptconv.values import Cast, Loss


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("execute") / "source.bin", mixed_bytes(8))


@pytest.fixture
def plan(source: Path) -> Plan:
    return mixed_plan(source, 1)


def result(folder: Path) -> dict[str, bytes]:
    files = read_tree(folder)
    del files["ckptconv.json"]
    return files


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def floats(path: Path, values: list[float]) -> Tensor:
    np.array(values, np.float32).tofile(path)
    return contiguous(whole(str(path)), (len(values),), FP32)


class Watch:
    def __init__(self) -> None:
        self.total = self.seen = self.ends = 0

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, nbytes: int) -> None:
        self.seen += nbytes

    def done(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("memory", [50 * 10**6, 10**9])
def test_result_is_what_the_plan_says(source: Path, tmp_path: Path, workers: int, memory: int) -> None:
    plan = mixed_plan(source, 8)
    report = execute(plan, tmp_path / "out", ExecuteOptions(workers=workers, memory=memory))
    assert result(tmp_path / "out") == expected(plan)
    assert beside(tmp_path) == ["out"]
    assert (report.bytes_written, report.bytes_resumed) == (plan.nbytes, 0)
    assert report.tensors == sum(isinstance(s.body, Tensor) for f in plan.files for s in f.segments)
    assert report.peak_memory > 10**6


def test_pickled_plan_gives_the_same(plan: Plan, tmp_path: Path) -> None:
    execute(pickle.loads(pickle.dumps(plan)), tmp_path / "a", ExecuteOptions(durable=False))
    execute(plan, tmp_path / "b")
    assert read_tree(tmp_path / "a") == read_tree(tmp_path / "b")
    assert fingerprint(pickle.loads(pickle.dumps(plan))) == fingerprint(plan)


def test_progress_ends_at_the_total(plan: Plan, tmp_path: Path) -> None:
    watch = Watch()
    execute(plan, tmp_path / "out", progress=watch)
    assert watch.seen == watch.total > plan.nbytes - 1
    assert watch.ends == 1


def test_empty_folder_is_replaced(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    execute(plan, tmp_path / "out")
    assert result(tmp_path / "out") == expected(plan)


def test_empty_folder_that_cannot_be_replaced_is_filled(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("ckptconv.executor.destination._mounted", lambda path: path.endswith("/out"))
    execute(plan, tmp_path / "out")
    assert result(tmp_path / "out") == expected(plan)
    with pytest.raises(PlanError, match="is not empty, and its parent"):
        execute(plan, tmp_path / "out", ExecuteOptions(force=True))


def test_existing_destination_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(PlanError, match="not an empty folder"):
        execute(plan, tmp_path / "out")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(PlanError, match="not an empty folder"):
        execute(plan, tmp_path / "file")
    assert read_tree(tmp_path) == {"file": b"precious", "out/mine.txt": b"precious"}


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_replaces(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool, kind: str) -> None:
    if not swap:
        monkeypatch.setattr("ckptconv.executor.destination.exchange", lambda a, b: False)
    if kind == "folder":
        (tmp_path / "out" / "rank_0").mkdir(parents=True)
        (tmp_path / "out" / "rank_0" / "old.txt").write_text("old")
    else:
        (tmp_path / "out").write_text("old")
    execute(plan, tmp_path / "out", ExecuteOptions(force=True))
    assert result(tmp_path / "out") == expected(plan)
    assert beside(tmp_path) == ["out"]


def test_force_never_replaces_the_source(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    source = write_source(tmp_path / "ckpt" / "source.bin", mixed_bytes(1))
    with pytest.raises(PlanError, match="holds the source"):
        execute(mixed_plan(source), tmp_path / "ckpt", ExecuteOptions(force=True))
    assert beside(tmp_path) == ["ckpt"]


def test_partial_without_journal_is_refused(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(ResumeError, match="has no journal"):
        execute(plan, tmp_path / "out")
    assert beside(tmp_path) == ["out.partial"]


def test_memory_bound_that_cannot_be_met_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"memory bound of 10,000,000 bytes is too small .* are needed"):
        execute(plan, tmp_path / "out", ExecuteOptions(memory=10**7))
    assert beside(tmp_path) == []


def test_too_little_disk_is_refused_with_both_numbers(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PlanError, match=r"has 1,000 bytes free, the result needs 6,"):
        execute(plan, tmp_path / "out")
    assert beside(tmp_path) == []


def test_missing_parent_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is not a folder"):
        execute(plan, tmp_path / "no" / "out")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([File("../x", 0, ())], "no name for a file"),
        ([File("/etc/x", 0, ())], "no name for a file"),
        ([File("a/../../x", 0, ())], "no name for a file"),
        ([File("ckptconv.json", 0, ())], "no name for a file"),
        ([File("a", 0, ()), File("a", 0, ())], "twice"),
        ([File("a", 0, ()), File("a/b", 0, ())], "as a file and as a folder"),
        ([File("a", 4, (Segment(1, b"abc"),))], "a gap or an overlap"),
        ([File("a", 9, (Segment(0, b"abc"),))], "segments end at byte 3"),
        ([File("a", 5, (Segment(0, Late(b"12345", ((2, 0),))),))], "cannot be"),
        ([File("a", 4, (Segment(0, Late(b"1234", ((0, 1),))),))], "cannot be"),
    ],
)
def test_unsound_plan_is_refused(tmp_path: Path, files: list[File], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        execute(Plan(tuple(files)), tmp_path / "out")
    assert beside(tmp_path) == []


def test_two_tensors_of_one_name_are_refused(source: Path, tmp_path: Path) -> None:
    a, b = carve(source, [(3,), (3,)])
    with pytest.raises(PlanError, match="two tensors are called 'w'"):
        execute(Plan((plain_file("a", [("w", a), ("w", b)]),)), tmp_path / "out")


def test_plan_without_bytes_gives_a_folder(tmp_path: Path) -> None:
    execute(Plan((File("a/empty", 0, ()), File("b", 3, (Segment(0, b"abc"),), final=True))), tmp_path / "out")
    assert result(tmp_path / "out") == {"a/empty": b"", "b": b"abc"}


def test_final_file_may_hold_a_tensor(source: Path, tmp_path: Path) -> None:
    (tensor,) = carve(source, [(400, 1000)])
    file = replace(plain_file("z", [("w", tensor)]), final=True)
    execute(Plan((file,), root=str(source.parent)), tmp_path / "out")
    assert result(tmp_path / "out") == expected(Plan((file,)))


def test_thousands_of_files_need_few_descriptors(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "OPEN_OUTPUTS", 4)
    monkeypatch.setattr("ckptconv.executor.worker.BARRIER", 100_000)
    tensors = carve(source, [(100,)] * 1500)
    plan = Plan(tuple(plain_file(f"{i // 100}/{i}", [("w", t)]) for i, t in enumerate(tensors)))
    before = len(os.listdir("/proc/self/fd"))
    execute(plan, tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) == before
    assert result(tmp_path / "out") == expected(plan)


class TestChecks:
    def plan(self, tmp_path: Path, pairs: list[tuple[list[float], list[float]]]) -> Plan:
        checks = []
        for i, (a, b) in enumerate(pairs):
            kept, copy = floats(tmp_path / f"a{i}", a), floats(tmp_path / f"b{i}", b)
            checks.append(Check(f"norm.{i}", kept, copy, f"rank tp={i}"))
        return Plan((plain_file("f", [("w", checks[0].kept)]),), tuple(checks))

    def test_equal_copies_pass(self, tmp_path: Path) -> None:
        values = [1.0, float("nan"), 2.0] * 500_000
        execute(self.plan(tmp_path, [(values, values)]), tmp_path / "out")

    def test_unlike_copies_are_all_listed(self, tmp_path: Path) -> None:
        same = [1.0] * 300_000
        other = [*same[:200_001], 2.5, *same[200_002:]]
        plan = self.plan(tmp_path, [(same, other), (same, same), ([0.0], [-0.0]), ([1.0, 2.0], [1.0, 3.0])])
        with pytest.raises(ReplicaError) as error:
            execute(plan, tmp_path / "out")
        text = str(error.value)
        assert "norm.0 (rank tp=0): first at [200001]: 1.0 is kept, 2.5 found" in text
        assert "norm.2 (rank tp=2): first at [0]: 0.0 is kept, -0.0 found" in text
        assert "norm.3 (rank tp=3): first at [1]" in text
        assert "norm.1" not in text
        assert not [name for name in beside(tmp_path) if name.startswith("out")]


class TestLoss:
    def plan(self, tmp_path: Path) -> Plan:
        large, small = floats(tmp_path / "l", [1e9, 1.0, -1e9, np.inf]), floats(tmp_path / "s", [1e-20, 0.0, 1.0])
        named = [("large", large.map(Cast(FP32, FP16), FP16)), ("small", small.map(Cast(FP32, FP16), FP16))]
        return Plan((plain_file("f", named),))

    def test_infinities_are_refused_and_listed(self, tmp_path: Path) -> None:
        with pytest.raises(ValueLossError, match=r"f: large: 2$"):
            execute(self.plan(tmp_path), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_allowing_them_continues_the_refused_run(self, tmp_path: Path) -> None:
        plan = self.plan(tmp_path)
        with pytest.raises(ValueLossError):
            execute(plan, tmp_path / "out")
        report = execute(plan, tmp_path / "out", ExecuteOptions(allow_overflow=True))
        assert report.losses == {"f: large": Loss(2, 0), "f: small": Loss(0, 1)}
        assert report.bytes_resumed == 4 * 2 + 3 * 2
        assert result(tmp_path / "out") == expected(plan)


def test_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "s", mixed_bytes(1))

    class Touch(Watch):
        def advance(self, nbytes: int) -> None:
            os.utime(source, ns=(1, 1))

    with pytest.raises(FormatError, match=r"changed while .*\n.*/s was modified"):
        execute(mixed_plan(source), tmp_path / "out", progress=Touch())
    assert beside(tmp_path) == ["s"]


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.bin"):
        execute(Plan((plain_file("f", [("w", carve(tmp_path / "gone.bin", [(4,)])[0])]),)), tmp_path / "out")
    assert beside(tmp_path) == []


def test_report_is_plain_data() -> None:
    report = Report(1, 2, 3.0, 4, 5)
    assert report.losses == {}
