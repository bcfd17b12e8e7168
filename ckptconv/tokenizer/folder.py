"""The tokenizer of a Hugging Face folder: all files that know of its tokens gain the new ones, with the same ids."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptconv.containers.folder import inside
from ckptconv.errors import FormatError
from ckptconv.huggingface.files import folder_of
from ckptconv.tokenizer import hf_json
from ckptconv.tokenizer.hf_json import AddedTable, JsonFile, TokenizerJson
from ckptconv.tokenizer.pieces import Pieces, read_pieces
from ckptconv.tokenizer.tokens import Extended, Wanted, refuse_known

MODEL = "tokenizer.model"
LISTS = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model")  # of the tokens it was trained with; never changed
OF_TOKENIZER = (
    MODEL, hf_json.TOKENIZER, hf_json.SETTINGS, hf_json.ADDED, hf_json.SPECIAL, *LISTS, "chat_template.json", "chat_template.jinja",
)  # fmt: skip
RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a line of tiktoken's files, which also go by tokenizer.model


@dataclass(frozen=True, slots=True)
class Parts:
    """What of a tokenizer there is in the folder."""

    fast: TokenizerJson | None
    pieces: Pieces | None
    settings: JsonFile | None
    decoder: AddedTable | None
    added: AddedTable | None
    special: JsonFile | None

    def listing(self) -> Iterator[TokenizerJson | Pieces | AddedTable]:
        """Those that give tokens their ids."""
        yield from (part for part in (self.fast, self.pieces, self.decoder, self.added) if part is not None)


def extend_folder(path: Path, wanted: Wanted) -> Extended:
    """Every file of the tokenizer that changes, ready to be written."""
    parts = read_parts(folder_of(path))
    longest = max(parts.listing(), key=lambda part: part.next_id)
    first = longest.next_id
    refuse_known(wanted, {t: part.what(t) for part in parts.listing() for t in wanted.tokens if t in part.known})
    files, notes = dict[str, bytes](), []
    if parts.fast is not None:
        if parts.fast.next_id != first:
            where, last = parts.fast.where, parts.fast.next_id - 1
            raise FormatError(
                where, f"ends with id {last}, but {longest.where} goes on to {first - 1}: they do not agree"
            )
        files[hf_json.TOKENIZER] = parts.fast.extended(wanted, first)
    if parts.pieces is not None and not (apart := _apart(parts.pieces, first, parts.fast)):
        files[MODEL] = parts.pieces.extended(wanted)
    elif os.path.lexists(path / MODEL):
        why = apart if parts.pieces is not None else "it holds ranks for tiktoken, which know of no added tokens"
        notes.append(f"{MODEL} stays as it is: {why}")
    if parts.settings is not None:
        files[hf_json.SETTINGS] = hf_json.with_settings(parts.settings, wanted, first)
    if parts.added is not None:
        files[hf_json.ADDED] = hf_json.with_added(parts.added.file, wanted, first)
    if parts.special is not None:
        files[hf_json.SPECIAL] = hf_json.with_special(parts.special, wanted)
    ids = wanted.numbered(first)
    return Extended(ids, first + len(ids), files, tuple(notes))


def _apart(pieces: Pieces, first: int, fast: TokenizerJson | None) -> str:
    """Why new pieces would not have the ids of the new tokens, or nothing."""
    if pieces.next_id != first:
        return f"it has {pieces.next_id} pieces, but other files have ids up to {first - 1}"
    others = (t for t, i in pieces.known.items() if fast is not None and fast.known.get(t, i) != i)
    other = next(others, None)
    return f"its ids are not those of {hf_json.TOKENIZER}, see {other!r}" if other is not None else ""


def read_parts(folder: Path) -> Parts:
    """At least tokenizer.json or a sentencepiece tokenizer.model must be there."""

    def there(name: str) -> Path | None:
        return inside(folder, name) if os.path.lexists(folder / name) else None

    fast, model, settings = there(hf_json.TOKENIZER), there(MODEL), there(hf_json.SETTINGS)
    added, special = there(hf_json.ADDED), there(hf_json.SPECIAL)
    if model is not None and _is_ranks(model):
        model = None
    if fast is None and model is None:
        raise FormatError(
            folder, f"no tokenizer that can gain tokens: expected {hf_json.TOKENIZER}, or a sentencepiece {MODEL}"
        )
    table = hf_json.read_json(settings) if settings else None
    return Parts(
        hf_json.read_tokenizer(fast) if fast else None,
        read_pieces(model) if model else None,
        table,
        hf_json.added_of_settings(table) if table else None,
        hf_json.read_added(added) if added else None,
        hf_json.read_json(special) if special else None,
    )


def _is_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return RANKS.match(file.read(4096)) is not None
