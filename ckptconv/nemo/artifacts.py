"""Files that a NeMo configuration refers to (`nemo:HASH_tokenizer.model`): what they are called in the archive and for a reader."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.errors import FormatError

SCHEME = "nemo:"
# what a GPT model may bring with it; a Hugging Face tokenizer is named in tokenizer.type and never packed
MODEL = "tokenizer.model"
TOKENIZER_KEYS = (MODEL, "tokenizer.vocab_file", "tokenizer.merge_file")
# each save of an extracted file puts one more in front
_HASHES = re.compile(r"(?:[0-9a-f]{32}_)+(?=.)")


@dataclass(frozen=True, slots=True)
class Artifact:
    """`key` is where the configuration names it; `member` its name in the archive (None: not in there); `name` without hashes."""

    key: str
    value: str
    member: str | None

    @property
    def name(self) -> str:
        return plain_name(self.member or self.value.removeprefix(SCHEME).rpartition("/")[2])


def plain_name(member: str) -> str:
    """`tokenizer.model` of `6508…_tokenizer.model`, however many hashes stand in front."""
    return _HASHES.sub("", member, count=1) if _HASHES.match(member) else member


def stored_name(name: str, content: bytes) -> str:
    """The name to write it under: NeMo draws a random number, we take the content's digest, so that equal inputs give equal files."""
    return f"{hashlib.sha256(content).hexdigest()[:32]}_{plain_name(name)}"


def uri(member: str) -> str:
    return SCHEME + member


def find(raw: Dict[str, object], members: Collection[str], where: object) -> tuple[Artifact, ...]:
    """Every artifact that a configuration refers to, as `nemo:NAME` or (old files) by a member's bare name.

    A `nemo:` one that is not among the archive's members is an error.
    """
    found, absent = [], []
    for key, value in _texts(raw, ""):
        if value.startswith(SCHEME):
            member = _checked(value.removeprefix(SCHEME), key, where)
            found.append(Artifact(key, value, member))
            absent += [] if member in members else [f"{key}: {value}"]
        elif (inside := value.removeprefix("./")) in members:
            found.append(Artifact(key, value, inside))
        elif key in TOKENIZER_KEYS and value:
            found.append(Artifact(key, value, None))  # a path of another machine
    if absent:
        raise FormatError(where, f"refers to files that are not there: {', '.join(absent)}; is the archive complete?")
    return tuple(found)


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{key}.{i}")


def _checked(member: str, key: str, where: object) -> str:
    """A name inside the archive; NeMo writes plain file names."""
    parts = member.removeprefix("./").split("/")
    if member.startswith("/") or any(part in ("", ".", "..") for part in parts) or "\0" in member:
        raise FormatError(where, f"{key} is {SCHEME}{member[:120]!r}: not a name inside the archive")
    return "/".join(parts)
