"""The JSON files of a Hugging Face tokenizer that list added tokens, and how each gains some."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptconv.containers import json_file
from ckptconv.errors import ExtraMissingError, FormatError
from ckptconv.tokenizer.tokens import EXTRA, Wanted, refuse_split

TOKENIZER, SETTINGS, ADDED, SPECIAL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
MAX_TOKENIZER = 100_000_000
LISTS = ("additional_special_tokens", "extra_special_tokens")  # of transformers 4 and of 5
Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A JSON file as text and as a table, written back in its own style."""

    where: str
    text: bytes = field(repr=False)
    table: Table = field(repr=False)

    def written(self, table: Table) -> bytes:
        """The table as this file would hold it: indented or on one line, with or without a newline at its end."""
        if table == self.table:
            return self.text
        body = self.text.strip()
        text = json.dumps(table, ensure_ascii=False, indent=2 if b"\n" in body else None)
        end = self.text[len(self.text.rstrip()) :].decode()
        try:
            return (text + end).encode()
        except UnicodeEncodeError:
            raise FormatError(self.where, "holds half a character (a lone surrogate)") from None


@dataclass(frozen=True, slots=True)
class AddedTable:
    """A table of added tokens: added_tokens.json (text -> id), or the one in tokenizer_config.json (id -> text and flags)."""

    file: JsonFile
    known: dict[str, int] = field(repr=False)

    @property
    def next_id(self) -> int:
        return max(self.known.values(), default=-1) + 1

    @property
    def where(self) -> str:
        return self.file.where

    def what(self, token: str) -> str:
        return f"id {self.known[token]} of {self.where}"


class TokenizerJson(AddedTable):
    """tokenizer.json, with the ids that the library itself gives."""

    __slots__ = ()

    def extended(self, wanted: Wanted, first: int) -> bytes:
        table, where = self.file.table, self.file.where
        added = [*(table.get("added_tokens") or ())]
        added += [{"id": number, **_entry(token, wanted)} for token, number in wanted.numbered(first).items()]
        text = self.file.written({**table, "added_tokens": added})
        tokenizer = _loaded(text, where)
        split = []
        for token, number in wanted.numbered(first).items():
            if (given := tokenizer.token_to_id(token)) != number:
                raise FormatError(where, f"{token!r} would have id {given}, expected {number}")
            found = tokenizer.encode(token, add_special_tokens=False).ids
            others = [i for i in found if i != number]
            if found.count(number) != 1 or tokenizer.decode(others, skip_special_tokens=False).strip():
                split.append(token)
        refuse_split(where, split)
        return text


def read_json(path: Path, limit: int = json_file.MAX_CONFIG) -> JsonFile:
    text = json_file.read_bytes(path, limit)
    return JsonFile(str(path), text, json_file.parse(text, str(path)))


def read_tokenizer(path: Path) -> TokenizerJson:
    """Ids in the file that the library would not give are refused: it counts by itself."""
    file = read_json(path, MAX_TOKENIZER)
    known: dict[str, int] = _loaded(file.text, file.where).get_vocab(with_added_tokens=True)
    added = file.table.get("added_tokens") or []
    for entry in added:
        content, number = entry["content"], entry["id"]
        if known.get(content) != number:
            raise FormatError(
                file.where,
                f"says that {content!r} is id {number}; the tokenizers library gives it {known.get(content)}",
            )
    return TokenizerJson(file, known)


def read_added(path: Path) -> AddedTable:
    file = read_json(path)
    return AddedTable(file, {token: _id(number, file.where) for token, number in file.table.items()})


def added_of_settings(file: JsonFile) -> AddedTable | None:
    """The table `added_tokens_decoder`, where there is one."""
    table = file.table.get("added_tokens_decoder")
    if table is None:
        return None
    if not isinstance(table, dict):
        raise FormatError(file.where, f"added_tokens_decoder is a {type(table).__name__}, expected a table of ids")
    known = {}
    for number, entry in table.items():
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise FormatError(file.where, f"added_tokens_decoder[{number}] has no content, expected a token's text")
        known[text] = _id(number, file.where)
    return AddedTable(file, known)


def with_settings(file: JsonFile, wanted: Wanted, first: int) -> bytes:
    """tokenizer_config.json with the tokens in its table, if it has one; control tokens are listed by text too."""
    table = file.table
    if table.get("added_tokens_decoder") is not None:
        new = {str(number): _flags(token, wanted) for token, number in wanted.numbered(first).items()}
        table = {**table, "added_tokens_decoder": {**table["added_tokens_decoder"], **new}}
    return file.written(_with_special(table, wanted))


def with_special(file: JsonFile, wanted: Wanted) -> bytes:
    """special_tokens_map.json with the control tokens in its list."""
    return file.written(_with_special(file.table, wanted))


def with_added(file: JsonFile, wanted: Wanted, first: int) -> bytes:
    """added_tokens.json with the tokens; sorted again, if it was."""
    table = {**file.table, **wanted.numbered(first)}
    return file.written(dict(sorted(table.items())) if list(file.table) == sorted(file.table) else table)


def _with_special(table: Table, wanted: Wanted) -> Table:
    """Whichever list there is; that of transformers 4, which 5 reads too, where there is none."""
    if not wanted.control:
        return table
    lists = {key: table[key] for key in LISTS if isinstance(table.get(key), list)}
    if not any(table.get(key) for key in LISTS):
        lists = lists or {LISTS[0]: []}
    return {**table, **{key: [*old, *wanted.tokens] for key, old in lists.items()}}


def _id(number: object, where: str) -> int:
    digits = isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) < 12
    if digits or (type(number) is int and number >= 0):
        return int(str(number))
    raise FormatError(where, f"{number!r} is given as a token's id, expected a number from 0 on")


def _entry(token: str, wanted: Wanted) -> Table:
    """A token of tokenizer.json. Not `normalized`: it is looked for in the text as it was typed."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **flags, "special": wanted.control}


def _flags(token: str, wanted: Wanted) -> Table:
    """The same in the order of tokenizer_config.json."""
    entry = _entry(token, wanted)
    return {key: entry[key] for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}


def _loaded(text: bytes, where: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ExtraMissingError(f"{where}: this tokenizer", EXTRA) from None
    try:
        tokenizer = Tokenizer.from_buffer(text)
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise FormatError(where, f"the tokenizers library cannot load it: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
