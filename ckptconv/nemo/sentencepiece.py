"""The pieces of a sentencepiece `.model` file, read from the protobuf itself: enough to know how many tokens there are."""

from __future__ import annotations

from collections.abc import Iterator

from ckptconv.errors import FormatError

MAX_BYTES = 64_000_000
_PIECES = 1  # ModelProto.pieces; ModelProto.SentencePiece.piece has the same number
_TRAINER = 2  # ModelProto.trainer_spec: always there, behind the pieces
_VARINT, _EIGHT, _COUNTED, _FOUR = 0, 1, 2, 5


def pieces(data: bytes, where: object) -> tuple[str, ...]:
    """The text of every piece; a piece's place is its id."""
    if len(data) > MAX_BYTES:
        raise FormatError(where, f"has {len(data)} bytes; more than {MAX_BYTES} is no sentencepiece model")
    found: list[str] = []
    for start, end in _counted(data, 0, len(data), _PIECES, where):
        texts = [data[a:b] for a, b in _counted(data, start, end, _PIECES, where)]
        if len(texts) != 1:
            raise FormatError(where, f"byte {start}: piece {len(found)} has {len(texts)} texts, expected one")
        found.append(texts[0].decode("utf-8", "replace"))
    if not found:
        raise FormatError(where, "has no pieces: it is no sentencepiece model")
    if not any(True for _ in _counted(data, 0, len(data), _TRAINER, where)):
        raise FormatError(where, f"has no description behind its {len(found)} pieces: truncated or damaged")
    return tuple(found)


def _counted(data: bytes, at: int, end: int, wanted: int, where: object) -> Iterator[tuple[int, int]]:
    """(start, end) of each field of this number that holds bytes; every other field is only stepped over."""
    while at < end:
        begin = at
        key, at = _varint(data, at, end, where)
        kind, size = key & 7, 0
        if kind == _VARINT:
            _, at = _varint(data, at, end, where)
        elif kind == _COUNTED:
            size, at = _varint(data, at, end, where)
        elif kind in (_EIGHT, _FOUR):
            size = 8 if kind == _EIGHT else 4
        else:
            raise FormatError(where, f"byte {begin}: a field of kind {kind}: this is no sentencepiece model")
        if size > end - at:
            raise FormatError(
                where, f"byte {begin}: a field of {size} bytes, {end - at} are left: truncated or damaged"
            )
        if kind == _COUNTED and key >> 3 == wanted:
            yield at, at + size
        at += size


def _varint(data: bytes, at: int, end: int, where: object) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            raise FormatError(where, f"byte {at}: ends inside a number: truncated or damaged")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise FormatError(where, f"byte {at}: a number of more than 64 bits: this is no sentencepiece model")
