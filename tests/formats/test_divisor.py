"""A wish for other padding of the vocabulary is met, refused, or told of; never passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckptconv.errors import ConfigError
from ckptconv.pipeline import Job, prepare
from tests.formats.helpers.megatron import make


def job(tmp_path: Path, divisor: int, saver: str, **wishes: Any) -> Job:
    """Of a checkpoint that does not say how many of its rows are real."""
    source = make(tmp_path, tp=1, pp=1, args={"vocab_size": None})
    return Job(source, saver=saver, vocab_divisor=divisor, **wishes)


@pytest.mark.parametrize("saver", ["mcore", "mcore-dist", "nemo", "nemo2"])
def test_rows_that_do_not_meet_it_are_refused(saver: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--make-vocab-size-divisible-by 7: .* 40 rows .*: give --vocab-size"):
        prepare(job(tmp_path, 7, saver))
    assert prepare(job(tmp_path / "told", 7, saver, vocab_size=38)).stored.config.vocab_rows == 42


@pytest.mark.parametrize("saver", ["mcore", "mcore-dist"])
def test_rows_that_meet_it_stay_and_that_is_said(saver: str, tmp_path: Path) -> None:
    def notes(divisor: int) -> Any:
        return prepare(job(tmp_path / str(divisor), divisor, saver)).plan.about["format_notes"]

    (note,) = notes(4)
    assert "40 rows are real is not known, so they are left as they are; --vocab-size tells it" in note
    assert notes(40) == []
