"""The journal keeps whole blocks, drops torn ones, and refuses what is not its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckptconv.errors import ResumeError
from ckptconv.executor.fingerprint import Fingerprint
from ckptconv.executor.journal import Journal, Proof, Seal
from ckptconv.executor.units import Claim
from ckptconv.source import Identity
from ckptconv.values import Loss

MINE = Fingerprint("ab" * 16, {"options": {"tp": 2}}, {"/src/a": Identity(10, 5)})
CLAIMS = [(Claim(f, s, 0), Proof(bytes([f, s] * 8), 7 * s, Loss(s, f))) for f in range(3) for s in range(4)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    journal = Journal.open(str(tmp_path / "j"))
    journal.begin(MINE)
    for i in range(0, 12, 3):
        journal.append(CLAIMS[i : i + 3])
    journal.close()
    return journal.path


def reopened(path: str) -> Journal:
    journal = Journal.open(path)
    journal.close()
    return journal


def test_reopened_has_all_claims(path: str) -> None:
    journal = reopened(path)
    assert journal.identity == MINE
    assert journal.done == dict(CLAIMS)
    assert journal.seal is None


def test_cut_anywhere_keeps_whole_blocks(path: str) -> None:
    whole = Path(path).read_bytes()
    for cut in range(len(whole)):
        Path(path).write_bytes(whole[:cut])
        journal = reopened(path)
        assert len(journal.done) % 3 == 0
        assert journal.done.items() <= dict(CLAIMS).items()
        assert (journal.identity is None) <= (not journal.done)


def test_flipped_byte_ends_what_counts(path: str) -> None:
    whole = Path(path).read_bytes()
    start = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for at in range(start, len(whole), 7):
        Path(path).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        done = reopened(path).done
        assert len(done) < 12
        assert done.items() <= dict(CLAIMS).items()


def test_appending_after_a_torn_block_counts(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"1 2 3 torn")
    journal = Journal.open(path)
    journal.begin(MINE)
    journal.append([(Claim(9, 9, 9), Proof(bytes(16), 0))])
    journal.finish(Seal(77, True))
    journal.close()
    journal = reopened(path)
    assert len(journal.done) == 13
    assert journal.seal == Seal(77, True)


def test_retracted_file_has_no_claims(path: str) -> None:
    journal = Journal.open(path)
    journal.retract([1])
    journal.append([(Claim(1, 0, 0), Proof(bytes(16), 0))])
    journal.close()
    assert [claim for claim in reopened(path).done if claim.file == 1] == [Claim(1, 0, 0)]


def test_full_disk_leaves_no_torn_block(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(path)
    real = os.pwrite

    def full(fd: int, data: memoryview, at: int) -> int:
        if len(data) < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) - 5], at)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space.*/j'"):
        journal.append([(Claim(8, 8, 8), Proof(bytes(16), 0))])
    monkeypatch.undo()
    journal.append([(Claim(9, 9, 9), Proof(bytes(16), 0))])
    journal.close()
    assert len(reopened(path).done) == 13


def test_block_that_did_not_become_durable_does_not_count(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is whole in the file all the same."""

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    journal = Journal.open(path)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        journal.append([(Claim(8, 8, 8), Proof(bytes(16), 0))])
    journal.close()
    assert reopened(path).done == dict(CLAIMS)


def test_other_plan_is_refused_with_what_changed(path: str) -> None:
    other = Fingerprint(
        "cd" * 16, {"options": {"tp": 4, "pp": 2}}, {"/src/a": Identity(11, 5), "/src/b": Identity(1, 1)}
    )
    journal = Journal.open(path)
    with pytest.raises(ResumeError) as error:
        journal.begin(other)
    journal.close()
    for text in (
        "options.tp was 2, is now 4",
        "options.pp was not set, is now 2",
        "/src/a had 10 bytes",
        "/src/b is new",
    ):
        assert text in str(error.value)


def test_modified_source_is_named(path: str) -> None:
    journal = Journal.open(path)
    with pytest.raises(ResumeError, match="/src/a was modified"):
        journal.begin(MINE._replace(digest="00", sources={"/src/a": Identity(10, 6)}))
    journal.close()


def test_other_recipes_are_refused(path: str) -> None:
    journal = Journal.open(path)
    with pytest.raises(ResumeError, match="how they are put together"):
        journal.begin(MINE._replace(digest="00"))
    journal.close()


def test_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text("dear diary\n")
    with pytest.raises(ResumeError, match="not a journal"):
        Journal.open(str(path))
    assert path.read_text() == "dear diary\n"


def test_second_run_at_the_same_time_is_refused(path: str) -> None:
    journal = Journal.open(path)
    with pytest.raises(ResumeError, match="another run"):
        Journal.open(path)
    journal.close()


def test_damaged_header_is_refused(path: str) -> None:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole.replace(b'"about"', b'"about'))
    with pytest.raises(ResumeError, match="is damaged"):
        Journal.open(path)
