"""Tokens to add: which texts can be one, and what holds them afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptconv.containers import json_file
from ckptconv.errors import FormatError, UsageError

EXTRA = "tokenizer"
MAX_LIST = 16_000_000


@dataclass(frozen=True, slots=True)
class Wanted:
    """New tokens, in the order of their ids. `control` ones stand for no text of a user (sentencepiece: CONTROL; Hugging
    Face: special); the others are found in any text (USER_DEFINED; not special)."""

    tokens: tuple[str, ...]
    control: bool = False

    def __post_init__(self) -> None:
        problems = [f"{token!r} {problem}" for token in self.tokens if (problem := _problem(token))]
        problems += [f"{token!r} is given {n} times" for token, n in Counter(self.tokens).items() if n > 1]
        if problems:
            raise UsageError("these cannot be added:" + "".join(f"\n  {p}" for p in problems))
        if not self.tokens:
            raise UsageError("no tokens are given: name them, or a file of them with --tokens-file")

    @property
    def kind(self) -> str:
        return "control" if self.control else "user-defined"

    def numbered(self, first: int) -> dict[str, int]:
        return {token: first + i for i, token in enumerate(self.tokens)}


@dataclass(frozen=True, slots=True)
class Extended:
    """A tokenizer with new tokens: their ids, how many ids it has now, the files that changed, and what to know."""

    ids: dict[str, int]
    size: int
    files: dict[str, bytes]
    notes: tuple[str, ...] = ()


def read_tokens(path: Path) -> list[str]:
    """A file of tokens, one a line, in UTF-8."""
    try:
        lines = json_file.read_bytes(path, MAX_LIST).decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(path, f"is not UTF-8: {error}") from None
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def refuse_known(wanted: Wanted, known: Mapping[str, str]) -> None:
    """No text may be there already. `known` says of texts what they are."""
    if found := [token for token in wanted.tokens if token in known]:
        lines = "".join(f"\n  {token!r}: {known[token]}" for token in found)
        raise UsageError(f"the tokenizer has these already:{lines}\nLeave them out, or choose other names.")


def refuse_split(where: object, split: Sequence[str]) -> None:
    """What the tokenizer's own library does not take for one token is no use as one."""
    if split:
        lines = "".join(f"\n  {token!r}" for token in split)
        raise UsageError(
            f"{where}: texts that would still be cut into several tokens:{lines}\n"
            "A text that the tokenizer changes before it looks for tokens cannot be one (spaces in sentencepiece are U+2581)."
        )


def _problem(token: str) -> str:
    if not token.strip():
        return "is empty"
    return "" if token.isprintable() else "holds characters that cannot be printed"
