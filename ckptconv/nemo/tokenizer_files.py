"""The tokenizer beside a model: which files it is made of, and how many tokens it has."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from fnmatch import fnmatchcase
from pathlib import Path

from ckptconv.containers import json_file
from ckptconv.errors import FormatError, UsageError
from ckptconv.huggingface.files import side_files
from ckptconv.nemo import sentencepiece
from ckptconv.source import Source, whole

SENTENCEPIECE, HF = "tokenizer.model", "tokenizer.json"
MAX_TOKENIZER = 100_000_000
_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "chat_template*",
)  # fmt: skip


def of_hugging_face(files: Dict[str, Source]) -> dict[str, Source]:
    """Those that make a tokenizer of transformers; none where there is only a sentencepiece model."""
    found = {name: files[name] for name in files if any(fnmatchcase(name, pattern) for pattern in _FILES)}
    return found if found.keys() - {SENTENCEPIECE} else {}


def given(path: Path, flag: str) -> dict[str, Source]:
    """The files that a user names: a sentencepiece model, a tokenizer.json, or the folder of a Hugging Face tokenizer."""
    if path.is_file():
        return {HF if path.suffix == ".json" else SENTENCEPIECE: whole(str(path))}
    if not path.is_dir():
        raise UsageError(f"{flag} {path}: no such file or folder; give a sentencepiece model or a tokenizer's folder")
    beside = side_files(path)
    found = {name: source for name, source in beside.items() if any(fnmatchcase(name, pattern) for pattern in _FILES)}
    if not found.keys() & {SENTENCEPIECE, HF, "vocab.json", "vocab.txt", "spiece.model"}:
        raise UsageError(f"{flag} {path}: the folder has neither {HF} nor {SENTENCEPIECE}; give a tokenizer's folder")
    return found


def tokens(files: Dict[str, Source]) -> int | None:
    """How many NeMo finds: those of the library that reads these files. None where that cannot be told from them."""
    if HF in files:
        return _distinct(json_file.read(files[HF], MAX_TOKENIZER), files[HF].path)
    if of_hugging_face(files) or SENTENCEPIECE not in files:
        return None
    source = files[SENTENCEPIECE]
    return len(sentencepiece.pieces(json_file.read_bytes(source, MAX_TOKENIZER), source.path))


def _distinct(table: Dict[str, object], where: str) -> int:
    """Texts of the vocabulary and of added tokens, each counted once."""
    match table:
        case {"model": {"vocab": dict() | list() as vocab}, **rest}:
            texts = {entry[0] if isinstance(entry, list) and entry else entry for entry in vocab}
            added = rest.get("added_tokens") or []
            if isinstance(added, list) and all(isinstance(entry, dict) for entry in added):
                return len({str(text) for text in texts} | {str(entry.get("content")) for entry in added})
    raise FormatError(where, "is no tokenizer.json: expected model.vocab and added_tokens")
