"""What goes wrong outside: full disks, cut and unreadable sources, a destination that appears meanwhile. Nothing half is left."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import FormatError, PlanError, ResumeError
from ckptconv.executor import system
from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.plan import Plan
from ckptconv.testing.plans import expected, mixed_bytes, mixed_plan, read_tree, write_source

SCALE = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("faults") / "source.bin", mixed_bytes(SCALE))


@pytest.fixture
def plan(source: Path) -> Plan:
    return mixed_plan(source, SCALE)


def beside(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def finish(plan: Plan, dst: Path) -> int:
    """Run it again without the fault; returns what could be kept."""
    report = execute(plan, dst)
    files = read_tree(dst)
    del files["ckptconv.json"]
    assert files == expected(plan)
    assert beside(dst.parent) == [dst.name]
    assert report.bytes_written <= plan.nbytes - report.bytes_resumed
    return report.bytes_resumed


def failing(real: Any, after: int, code: int) -> Any:
    """A system call that works so many times, then not."""
    left = [after]

    def call(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        return real(*args)

    return call


def test_full_disk_at_allocation_leaves_nothing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptconv.executor.outputs.allocate", failing(system.allocate, 2, errno.ENOSPC))
    with pytest.raises(OSError, match=r"No space left.*model\.safetensors"):
        execute(plan, tmp_path / "out")
    assert beside(tmp_path) == []


@pytest.mark.parametrize("after", [0, 15, 30])
def test_full_disk_later_keeps_what_is_finished(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr("ckptconv.executor.worker.BARRIER", 1 << 20)
    real = os.pwrite
    out = failing(real, after, errno.ENOSPC)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (out if is_output(fd) else real)(fd, data, at))
    with pytest.raises(OSError, match=r"No space left.*out\.partial"):
        execute(plan, tmp_path / "out", ExecuteOptions(workers=1))
    assert not (tmp_path / "out").exists()
    assert beside(tmp_path) == (["out.journal", "out.partial"] if after else [])
    monkeypatch.undo()
    assert (finish(plan, tmp_path / "out") > 0) == (after > 0)


def is_output(fd: int) -> bool:
    return ".partial/" in os.readlink(f"/proc/self/fd/{fd}")


def test_file_size_limit_is_an_error_that_names_the_file(plan: Plan, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))  # Python ignores SIGXFSZ: writes fail with EFBIG
    try:
        with pytest.raises(OSError, match=r"too large.*rank_0/model\.pt"):
            execute(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert beside(tmp_path) == []


def test_sync_failure_claims_nothing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdatasync", failing(os.fdatasync, 0, errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error.*out\.partial"):
        execute(plan, tmp_path / "out")
    assert beside(tmp_path) == []
    monkeypatch.undo()
    assert finish(plan, tmp_path / "out") == 0


def test_no_preallocation_is_fine(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_function", lambda name: None)
    assert finish(plan, tmp_path / "out") == 0


def test_source_cut_after_planning_names_file_and_byte(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.bin", mixed_bytes(SCALE))
    plan = mixed_plan(source, SCALE)
    os.truncate(source, 1_000_000)
    with pytest.raises(FormatError, match=r"source\.bin: has 1,000,000 bytes, .* are expected"):
        execute(plan, tmp_path / "out")
    assert beside(tmp_path) == ["source.bin"]


def test_source_cut_while_it_is_read_names_file_and_byte(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.bin", mixed_bytes(SCALE))
    plan = mixed_plan(source, SCALE)
    with pytest.raises(FormatError, match=r"source\.bin: nothing at byte \d+, \d+ more are expected"):
        execute(plan, tmp_path / "out", ExecuteOptions(workers=1), Meddler(lambda: os.truncate(source, 10_000)))
    assert beside(tmp_path) == ["source.bin"]


def test_read_error_names_the_file_and_keeps_the_rest(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptconv.executor.worker.BARRIER", 1 << 20)
    monkeypatch.setattr(os, "preadv", failing(os.preadv, 15, errno.EIO))
    with pytest.raises(OSError, match=r"Input/output error.*source\.bin"):
        execute(plan, tmp_path / "out", ExecuteOptions(workers=1))
    monkeypatch.undo()
    assert finish(plan, tmp_path / "out") > 0


def test_source_that_cannot_be_opened_is_named(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def locked(path: str, *args: Any) -> int:
        if str(path).endswith("source.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args)

    monkeypatch.setattr(os, "open", locked)
    with pytest.raises(PermissionError, match=r"source\.bin"):
        execute(plan, tmp_path / "out")
    monkeypatch.undo()
    finish(plan, tmp_path / "out")


class Meddler:
    """Does something to the world once half of the bytes are written."""

    def __init__(self, act: Any) -> None:
        self.act, self.left = act, 0

    def start(self, total_bytes: int) -> None:
        self.left = total_bytes // 2

    def advance(self, nbytes: int) -> None:
        if self.left > 0 >= self.left - nbytes:
            self.act()
        self.left -= nbytes

    def done(self) -> None:
        pass


def test_destination_that_appears_meanwhile_is_not_touched(plan: Plan, tmp_path: Path) -> None:
    dst = tmp_path / "out"

    def appear() -> None:
        dst.mkdir()
        (dst / "mine.txt").write_text("precious")

    with pytest.raises(PlanError, match="appeared meanwhile"):
        execute(plan, dst, progress=Meddler(appear))
    assert read_tree(dst) == {"mine.txt": b"precious"}
    (dst / "mine.txt").unlink()
    report = execute(plan, dst)  # an empty folder is no obstacle, and all the work was kept
    assert report.bytes_written == 0
    assert beside(tmp_path) == ["out"]


def test_two_runs_at_once_one_is_refused(plan: Plan, tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(ResumeError, match="another run is at work") as error:
            execute(plan, tmp_path / "out")
        refused.append(str(error.value))

    execute(plan, tmp_path / "out", progress=Meddler(second))
    assert len(refused) == 1


def test_interrupt_keeps_what_is_finished(plan: Plan, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=Meddler(interrupt))
    assert finish(plan, tmp_path / "out") > 0


def test_changed_option_is_named_and_nothing_is_lost(plan: Plan, source: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=Meddler(_raise_interrupt))
    other = Plan(plan.files, plan.checks, {"ckptconv": "test", "options": {"scale": 99}}, plan.root)
    with pytest.raises(ResumeError, match=r"options\.scale was 2, is now 99"):
        execute(other, tmp_path / "out")
    os.utime(source, ns=(5, 5))
    with pytest.raises(ResumeError, match=r"source\.bin was modified"):
        execute(mixed_plan(source, SCALE), tmp_path / "out")


def _raise_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("spoil", ["unlink", "cut"])
def test_claims_on_a_lost_file_are_dropped(plan: Plan, tmp_path: Path, spoil: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", ExecuteOptions(workers=1), Meddler(_raise_interrupt))
    for path in (tmp_path / "out.partial" / "rank_0" / "model.pt",):
        path.unlink() if spoil == "unlink" else os.truncate(path, 1000)
    finish(plan, tmp_path / "out")


def test_claims_stay_dropped_when_the_second_run_is_stopped_too(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", ExecuteOptions(workers=1), Meddler(_raise_interrupt))
    for file in plan.files[:3]:
        (tmp_path / "out.partial" / file.path).unlink()

    class AtOnce(Meddler):
        def start(self, total_bytes: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=AtOnce(None))
    assert finish(plan, tmp_path / "out") == 0
