"""The executor: carries out a plan with a few threads in bounded memory; a run that was stopped is continued."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from ckptconv.collecting import old_ones_kept
from ckptconv.errors import FormatError, PlanError, ReplicaError, ResumeError, ValueLossError
from ckptconv.executor.complete import Completion, folders
from ckptconv.executor.destination import Destination, check_free, check_space, commit, discard, in_place, locate
from ckptconv.executor.fingerprint import Fingerprint, changed_sources, fingerprint, validate
from ckptconv.executor.journal import Journal, Proof, Seal
from ckptconv.executor.outputs import Outputs, sync_folder
from ckptconv.executor.units import CHECKS, PIECE, Claim, units
from ckptconv.executor.worker import START, Ledger, Progress, Worker
from ckptconv.plan import Plan
from ckptconv.tensor import Tensor
from ckptconv.values import Loss

__all__ = ["ExecuteOptions", "Progress", "Report", "execute"]

BASE = 40 * 10**6  # the interpreter and numpy
PER_TENSOR = 2000  # recipe, unit, claim and manifest line of one output tensor
MOST_WORKERS = 4


@dataclass(frozen=True, slots=True)
class ExecuteOptions:
    """`memory` bounds the whole process; `workers` None is one for each core, four at most."""

    memory: int = 10**9
    workers: int | None = None
    durable: bool = True
    force: bool = False
    allow_overflow: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did. `losses` has the tensors (`file: name`) in which a cast made infinities or zeros."""

    bytes_written: int
    bytes_resumed: int
    seconds: float
    peak_memory: int
    tensors: int
    losses: Mapping[str, Loss] = field(default_factory=dict)


@old_ones_kept()
def execute(plan: Plan, dst: Path, options: ExecuteOptions | None = None, progress: Progress | None = None) -> Report:
    """Write the plan's files to `dst`, which must be absent or an empty folder; continue what an earlier run left.

    A `single` plan's one file becomes `dst` itself, which must be absent.
    """
    options = options or ExecuteOptions()
    started = time.perf_counter()
    validate(plan)
    workers, most = fit(plan, options)
    place = locate(dst, plan.files[0].path if plan.single else "")
    identity = fingerprint(plan)
    journal = Journal.open(place.journal, options.durable)
    try:
        run = _Run(plan, place, identity, journal, options)
        if not run.sealed_earlier():
            run.make(workers, most, progress)
        losses = run.completion.losses()
        run.commit()
    except BaseException:
        run_is_new = journal.identity is None
        if run_is_new:
            journal.remove()
        raise
    finally:
        journal.close()
    seconds = time.perf_counter() - started
    return Report(run.outputs.written, run.resumed, seconds, peak_memory(), _count(plan), losses)


def fit(plan: Plan, options: ExecuteOptions) -> tuple[int, int]:
    """(workers, bytes of each of a worker's two buffers) within the memory bound; PlanError if nothing fits."""
    wanted = options.workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    least = memory_needed(plan)
    room = options.memory - least + 2 * START
    if room < 2 * START:
        raise PlanError(
            f"a memory bound of {options.memory:,} bytes is too small for this plan: "
            f"{least:,} are needed ({_count(plan):,} tensors to keep track of)"
        )
    workers = max(1, min(wanted, room // (2 * START)))
    return workers, min(PIECE, room // (2 * workers))


def memory_needed(plan: Plan) -> int:
    """The smallest memory bound the plan can be carried out in."""
    plain = sum(s.nbytes for f in plan.files for s in f.segments if not isinstance(s.body, Tensor))
    return BASE + PER_TENSOR * (_count(plan) + len(plan.checks)) + plain + 2 * START


def peak_memory() -> int:
    """The most this process ever held, in bytes."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _count(plan: Plan) -> int:
    return sum(isinstance(s.body, Tensor) for f in plan.files for s in f.segments)


class _Run:
    """One execution, from what the journal says to the sealed result."""

    def __init__(
        self, plan: Plan, place: Destination, identity: Fingerprint, journal: Journal, options: ExecuteOptions
    ) -> None:
        self.plan, self.place, self.identity, self.journal, self.options = plan, place, identity, journal, options
        self.outputs = Outputs(place.partial, plan.files, options.durable)
        self.proofs: dict[Claim, Proof] = {}  # of all that is written; what is in the journal is durable besides
        self.completion = Completion(plan, self.outputs, self.proofs)
        self.resumed = 0

    def sealed_earlier(self) -> bool:
        """Whether only the commit is left. The leftovers of another plan's commit are cleared away."""
        seal, known = self.journal.seal, self.journal.identity
        if seal is None or known is None:
            return False
        if known.digest == self.identity.digest:
            self.resumed = self.plan.nbytes
            self.proofs.update(self.journal.done)
            return True
        if not in_place(self.place, seal):
            return False  # `begin` refuses, and says what changed
        commit(self.place, seal, self._sync_folder)
        self.journal.clear()
        return False

    def make(self, workers: int, most: int, progress: Progress | None) -> None:
        """Everything up to the seal. Should it fail, what is finished is kept, if a later run could use it."""
        check_free(self.place, self.options.force, self.identity.sources)
        if self.journal.identity is None and os.path.lexists(self.place.partial):
            raise ResumeError(f"{self.place.partial} has no journal: it is not known what it is; move it away")
        self.journal.begin(self.identity)
        try:
            self._prepare()
            self._work(workers, most, progress)
            self._finish()
        except BaseException as error:
            if isinstance(error, ReplicaError | FormatError) or not self.journal.done:
                discard(self.place)
                self.journal.clear()
            raise
        finally:
            self.outputs.close()
            if progress is not None:
                progress.done()

    def commit(self) -> None:
        assert self.journal.seal is not None
        commit(self.place, self.journal.seal, self._sync_folder)
        self.journal.remove()
        for path in self.plan.scratch:
            Path(path).unlink(missing_ok=True)

    def _prepare(self) -> None:
        """Folders, and every file with its full size; claims on files that are not there are void."""
        claimed = {claim.file for claim in self.journal.done} - {CHECKS}
        lost = [f for f in claimed if not self.outputs.whole(f)]
        self.journal.retract(lost)
        self.proofs.update(self.journal.done)
        for claim in self.journal.done:
            if claim.file != CHECKS:
                size = self.plan.files[claim.file].segments[claim.segment].nbytes
                self.resumed += min(PIECE, size - claim.piece * PIECE)
        missing = {f for f, file in enumerate(self.plan.files) if not file.final and not self.outputs.whole(f)}
        check_space(self.place, [file.size for f, file in enumerate(self.plan.files) if f in missing or file.final])
        for folder in folders(self.place.partial, self.plan.files):
            os.makedirs(folder, exist_ok=True)
        for f in sorted(missing):
            self.outputs.create(f)

    def _work(self, workers: int, most: int, progress: Progress | None) -> None:
        """All tensors. What will stand between them is worked out while the disk still takes the last ones."""
        ledger = Ledger(units(self.plan, self.proofs), self.proofs, progress)
        self.ledger = ledger
        if progress is not None:
            progress.start(self.plan.nbytes + sum(check.kept.nbytes for check in self.plan.checks))
            progress.advance(self.resumed)
        threads = [
            Thread(target=Worker(self.plan, self.outputs, ledger, most).run, daemon=True) for _ in range(workers)
        ]
        syncer = Thread(target=self._syncer, daemon=True)
        for thread in (*threads, syncer):
            thread.start()
        try:
            for thread in threads:
                thread.join()
            ledger.end()
            if not ledger.errors:
                self._check_equal()
                self.completion.prepare(ledger.covered)
        except BaseException as error:  # noqa: BLE001 - raised again below
            ledger.fail(error)
            for thread in threads:
                thread.join()
        ledger.end()
        syncer.join()
        if ledger.errors:
            raise ledger.errors[0]

    def _syncer(self) -> None:
        """A barrier when it is time for one, and at the end, however that came: what is finished stays finished."""
        try:
            while self.ledger.await_barrier():
                self._barrier()
            self._barrier()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that started this one
            self.ledger.fail(error)

    def _barrier(self) -> None:
        """First the data is on disk, then the lines that say so."""
        claims, files = self.ledger.take()
        self.outputs.sync(files)
        if claims:
            self.journal.append(claims)
            self.completion.note(claims)

    def _check_equal(self) -> None:
        if self.ledger.unequal:
            found = dict(sorted(self.ledger.unequal, reverse=True))
            lines = [f"  {self.plan.checks[c].name} ({self.plan.checks[c].where}): {found[c]}" for c in sorted(found)]
            raise ReplicaError("copies that must be equal bit for bit are not:\n" + "\n".join(lines))

    def _finish(self) -> None:
        """All that is not a tensor; then, if the sources are still what they were, the seal."""
        options, partial = self.options, self.place.partial
        self.completion.wrote = self.ledger.advance
        self.completion.write_rest()
        self.outputs.sync([f for f, file in enumerate(self.plan.files) if not file.final])
        self.completion.write_final()
        infinite = {name: loss.to_inf for name, loss in self.completion.losses().items() if loss.to_inf}
        if infinite and not options.allow_overflow:
            lines = [f"  {name}: {n:,}" for name, n in infinite.items()]
            raise ValueLossError(
                "finite values are too large for the new dtype and would become infinite:\n" + "\n".join(lines)
            )
        self.completion.write_manifest(partial, self.identity, options.durable)
        if changed := changed_sources(self.identity.sources):
            raise FormatError("sources", "changed while they were read:\n  " + "\n  ".join(changed))
        for folder in reversed(folders(partial, self.plan.files)):
            self._sync_folder(folder)
        inode = 0 if self.place.inside else os.stat(self.place.complete).st_ino
        self.journal.finish(Seal(inode, options.force, self.plan.single))

    def _sync_folder(self, path: str) -> None:
        if self.options.durable:
            sync_folder(path)
