"""Sentencepiece models: pieces appended with the package's own description of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptconv.containers import json_file
from ckptconv.errors import ExtraMissingError, FormatError
from ckptconv.tokenizer.tokens import EXTRA, Extended, Wanted, refuse_known, refuse_split

MAX_MODEL = 16_000_000  # those of the largest multilingual vocabularies have 5


@dataclass(frozen=True, slots=True)
class Pieces:
    """A sentencepiece model; a piece's id is its number."""

    where: str
    text: bytes = field(repr=False)
    known: dict[str, int] = field(repr=False)

    @property
    def next_id(self) -> int:
        return len(self.known)

    def what(self, token: str) -> str:
        return f"piece {self.known[token]} of {self.where}"

    def extended(self, wanted: Wanted) -> bytes:
        """The file with new pieces at its end; sentencepiece must load it, and take each for one."""
        model = _parsed(self.text, self.where)
        kind = model.SentencePiece.CONTROL if wanted.control else model.SentencePiece.USER_DEFINED
        for token in wanted.tokens:
            model.pieces.add(piece=token, score=0.0, type=kind)
        text: bytes = model.SerializeToString()
        _check(text, self.where, wanted, self.next_id)
        return text


def read_pieces(path: Path) -> Pieces:
    return parse_pieces(json_file.read_bytes(path, MAX_MODEL), str(path))


def parse_pieces(text: bytes, where: str) -> Pieces:
    known: dict[str, int] = {}
    for number, piece in enumerate(_parsed(text, where).pieces):
        token = piece.piece  # bytes, if it is not UTF-8
        if not isinstance(token, str) or not token or token in known:
            found = f"piece {known[token]}" if token in known else "not valid"
            raise FormatError(where, f"is damaged: the text of piece {number}, {token!r}, is {found}")
        known[token] = number
    return Pieces(where, text, known)


def extend_model(path: Path, wanted: Wanted) -> Extended:
    """A model file with new pieces, under its own name."""
    pieces = read_pieces(path)
    refuse_known(wanted, {token: pieces.what(token) for token in wanted.tokens if token in pieces.known})
    ids = wanted.numbered(pieces.next_id)
    return Extended(ids, pieces.next_id + len(ids), {path.name: pieces.extended(wanted)})


def _parsed(text: bytes, where: str) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ExtraMissingError(f"{where}: sentencepiece models", EXTRA) from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(text)
    except DecodeError:
        raise FormatError(where, "is not a sentencepiece model, or a damaged one") from None
    if not model.pieces:
        raise FormatError(where, "is not a sentencepiece model: there are no pieces in it")
    return model


def _check(text: bytes, where: str, wanted: Wanted, first: int) -> None:
    """Control pieces are never found in text; the others must be."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=text)
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of its own message
        raise FormatError(where, f"sentencepiece does not load it with the new pieces: {error}") from None
    split = []
    for token, number in wanted.numbered(first).items():
        if processor.piece_to_id(token) != number:
            raise FormatError(where, f"{token!r} would have id {processor.piece_to_id(token)}, expected {number}")
        found = processor.encode(token)
        others = [i for i in found if i != number]
        if not wanted.control and (found.count(number) != 1 or processor.decode(others).strip()):
            split.append(token)
    refuse_split(where, split)
