"""kill -9 in every phase: the destination is never half there, and a second run finishes without doing journaled work again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckptconv.executor.execute import ExecuteOptions, execute
from ckptconv.executor.journal import Journal
from ckptconv.executor.units import CHECKS, pieces
from ckptconv.plan import Plan
from ckptconv.tensor import Tensor
from ckptconv.testing.plans import expected, mixed_bytes, mixed_plan, read_tree, write_source
from tests.executor.child import single_plan

SCALE = 4
CHILD = Path(__file__).with_name("child.py")
ROOT = Path(__file__).parents[2]
MANIFEST = ".ckptconv.json"  # how the name of a single file's manifest ends


class Case:
    """A plan, what it gives, and how many system calls each phase of it makes."""

    def __init__(self, folder: Path, single: bool) -> None:
        self.single = single
        self.source = write_source(folder / "source.bin", mixed_bytes(SCALE))
        self.plan = (single_plan if single else mixed_plan)(self.source, SCALE)
        done = self.child(folder / "whole", "-", 0)
        self.calls: dict[str, int] = json.loads(done.stdout)
        self.files = self.read(folder / "whole")

    def read(self, dst: Path) -> dict[str, bytes]:
        """The files of a result; those of a single one by how their names end."""
        if not self.single:
            return read_tree(dst)
        paths = {end: Path(f"{dst}{end}") for end in ("", MANIFEST)}
        return {end: path.read_bytes() for end, path in paths.items() if path.exists()}

    def child(self, dst: Path, phase: str, number: int, force: bool = False) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            str(CHILD),
            str(self.source),
            str(dst),
            str(SCALE),
            str(int(self.single)),
            str(int(force)),
            phase,
            str(number),
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("kill"), single=False)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("kill"), single=True)


def test_whole_run_is_right(case: Case, single: Case) -> None:
    files = dict(case.files)
    del files["ckptconv.json"]
    assert files == expected(case.plan)
    assert single.files[""] == b"".join(files[file.path] for file in case.plan.files)


@pytest.mark.parametrize("phase", ["planning", "first", "middle", "final", "rename"])
@pytest.mark.parametrize("seed", range(5))
def test_kill_then_second_run_completes(case: Case, tmp_path: Path, phase: str, seed: int) -> None:
    rng = random.Random(f"{phase} {seed}")
    dst = tmp_path / "out"
    number = rng.randint(1, case.calls[phase])
    while (killed := case.child(dst, phase, number)).returncode == 0:  # fewer calls this time: threads differ
        shutil.rmtree(dst)
        number = max(1, number * 3 // 4)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if dst.exists():
        assert read_tree(dst) == case.files
        assert phase == "rename"
    kept = journaled(case.plan, dst)
    if seed % 2:
        spoil_unclaimed(case.plan, dst, rng)
    if dst.exists() and not (tmp_path / "out.journal").exists():
        return  # killed at the very end
    report = execute(case.plan, dst, ExecuteOptions(workers=2))
    assert report.bytes_written <= case.plan.nbytes - kept
    assert read_tree(dst) == case.files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("phase", ["planning", "first", "middle", "final"])
@pytest.mark.parametrize("seed", range(2))
def test_kill_while_a_single_file_is_made(single: Case, tmp_path: Path, phase: str, seed: int) -> None:
    rng = random.Random(f"{phase} {seed}")
    dst = tmp_path / "out"
    killed = single.child(dst, phase, rng.randint(1, single.calls[phase] * 3 // 4))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert single.read(dst) == {}
    kept = journaled(single.plan, dst)
    spoil_unclaimed(single.plan, dst, rng)
    report = execute(single.plan, dst, ExecuteOptions(workers=2))
    assert report.bytes_written <= single.plan.nbytes - kept
    assert single.read(dst) == single.files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.ckptconv.json"]


@pytest.mark.parametrize("old", [{}, {"": b"old"}, {"": b"old", MANIFEST: b"of old"}], ids=["new", "file", "result"])
def test_kill_at_every_step_that_puts_a_single_file_in_place(
    single: Case, tmp_path: Path, old: dict[str, bytes]
) -> None:
    """At any moment the file is the old or the new one, and a manifest is the one of the file it stands beside."""
    seen = []
    for number in range(1, 100):
        dst = tmp_path / str(number) / "out"
        dst.parent.mkdir()
        for end, data in old.items():
            Path(f"{dst}{end}").write_bytes(data)
        done = single.child(dst, "rename", number, force=bool(old))
        seen.append(single.read(dst))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        if Path(f"{dst}.journal").exists():
            execute(single.plan, dst, ExecuteOptions(force=bool(old), workers=2))
        assert single.read(dst) == single.files
        assert sorted(p.name for p in dst.parent.iterdir()) == ["out", "out.ckptconv.json"]
    new = single.files
    steps = [old, {k: v for k, v in old.items() if not k}, {"": new[""]}, new]
    assert seen == sorted(seen, key=steps.index)
    assert seen[0] == old
    assert seen[-1] == new
    assert {"": new[""]} in seen


@pytest.mark.parametrize("seed", range(6))
def test_kill_while_replacing_leaves_old_or_new(case: Case, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    dst = tmp_path / "out"
    dst.mkdir()
    (dst / "old.txt").write_text("old")
    case.child(dst, ["final", "rename", "rename"][seed % 3], rng.randint(1, case.calls["rename"] + seed), force=True)
    assert read_tree(dst) in ({"old.txt": b"old"}, case.files)
    if (tmp_path / "out.journal").exists():
        execute(case.plan, dst, ExecuteOptions(force=True))
    assert read_tree(dst) == case.files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_kill_after_kill_after_kill(case: Case, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    kept = 0
    for number in range(20, 1000, 20):
        if case.child(dst, "middle", number).returncode == 0:
            break
        before, kept = kept, journaled(case.plan, dst)
        assert kept >= before
    assert kept > 0
    assert read_tree(dst) == case.files


def journaled(plan: Plan, dst: Path) -> int:
    """Bytes that the journal claims."""
    return sum(hi - lo for f, s, lo, hi in claimed(plan, dst))


def claimed(plan: Plan, dst: Path) -> list[tuple[int, int, int, int]]:
    path = Path(f"{dst}.journal")
    if not path.exists():
        return []
    copy = path.with_suffix(".copy")  # reading one truncates what is torn: leave that to the second run
    shutil.copy(path, copy)
    journal = Journal.open(str(copy))
    found = []
    for claim in journal.done:
        if claim.file != CHECKS:
            spans = {p: (lo, hi) for p, lo, hi in pieces(plan.files[claim.file].segments[claim.segment].nbytes)}
            found.append((claim.file, claim.segment, *spans[claim.piece]))
    journal.remove()
    return found


def spoil_unclaimed(plan: Plan, dst: Path, rng: random.Random) -> None:
    """What power loss may do: whatever no synced journal line speaks for can hold anything (if nothing is sealed)."""
    partial = Path(f"{dst}.partial")
    journal = Path(f"{dst}.journal")
    if not partial.exists() or b"\n! " in journal.read_bytes():
        return
    good: dict[int, list[tuple[int, int]]] = {}
    for f, s, lo, hi in claimed(plan, dst):
        base = plan.files[f].segments[s].offset
        good.setdefault(f, []).append((base + lo, base + hi))
    for f, file in enumerate(plan.files):
        path = partial / file.path
        if not path.exists():
            continue
        data = bytearray(rng.randbytes(path.stat().st_size))
        whole = path.read_bytes()
        for lo, hi in good.get(f, []):
            data[lo:hi] = whole[lo:hi]
        path.write_bytes(data)


def test_plan_has_every_kind_of_unit(case: Case) -> None:
    bodies = [type(s.body) for f in case.plan.files for s in f.segments]
    assert any(issubclass(kind, Tensor) for kind in bodies)
    assert {"bytes", "Late"} <= {kind.__name__ for kind in bodies}
