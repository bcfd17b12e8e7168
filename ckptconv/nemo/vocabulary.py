"""The true size of a vocabulary: NeMo's own fields say rows, padding among them, so a key of ours says how many are real."""

from __future__ import annotations

from collections.abc import Mapping as Dict

from ckptconv.errors import ConfigError

KEY = "true_vocab_size"  # NeMo passes over keys that it does not know


def number(table: Dict[str, object], key: str, where: str) -> int | None:
    """A size that a configuration says; null is as if it were not there."""
    value = table.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{where}: {key} is {str(value)[:60]}: it must be a whole number above 0")
    return value


def true_size(ours: int | None, rows: int | None, tokens: int | None, *, given: bool = False) -> int | None:
    """What our key says, else the tokens of the tokenizer. None: not known.

    `rows` are those that NeMo is told to build whatever its tokenizer; where the tokenizer has fewer tokens, the others may be the
    model's own or padding, and only a tokenizer that the user has `given` for this settles it.
    """
    if ours is not None or rows is None or tokens is None:
        return ours if ours is not None or rows is not None else tokens
    return min(tokens, rows) if given or tokens >= rows else None


def doubt(rows: int | None, vocab: int | None, field: str) -> tuple[str, ...]:
    """What to say of rows that may be padding."""
    if rows is None or vocab is not None:
        return ()
    return (
        f"{field} {rows} counts rows, padding or not, and no tokenizer tells how many are real: --vocab-size {rows} if all are",
    )
