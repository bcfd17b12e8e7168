"""Edits of the canonical graph between import and export: dtype, vocabulary rows, what travels along. Each is a pure function."""

from __future__ import annotations

from dataclasses import replace

from ckptconv.checkpoint import Checkpoint, Key
from ckptconv.dtypes import DTYPES, DType
from ckptconv.errors import ConfigError, UsageError
from ckptconv.mapping import Mapping
from ckptconv.nodes import Fill, concat
from ckptconv.tensor import Tensor
from ckptconv.values import Cast

STATE_SLOTS = frozenset({"exp_avg", "exp_avg_sq"})  # moments: padded with zeros, never cast


def cast(checkpoint: Checkpoint, dtype: str, mapping: Mapping) -> Checkpoint:
    """All floating-point parameters in one dtype, but for atoms that the vocabulary keeps in another."""
    if dtype == "keep":
        return checkpoint
    if dtype not in DTYPES or not DTYPES[dtype].is_float:
        raise UsageError(f"--dtype {dtype}: expected keep, fp32, bf16 or fp16")
    wanted = DTYPES[dtype]

    def one(key: Key, tensor: Tensor) -> Tensor:
        if key.slot != "param" or not tensor.dtype.is_float:
            return tensor
        atom = mapping.vocabulary.atom_of(key.name)
        to = atom.dtype if atom and atom.dtype else wanted
        return tensor if tensor.dtype == to else tensor.map(Cast(tensor.dtype, to), to)

    tensors = {key: one(key, tensor) for key, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, config=replace(checkpoint.config, dtype=wanted))


def resize_vocabulary(checkpoint: Checkpoint, rows: int, mapping: Mapping) -> Checkpoint:
    """Every vocabulary axis with `rows` entries: padding cut away down to the true size, then the last true row repeated."""
    config = checkpoint.config
    if rows == config.vocab_rows:
        return checkpoint
    true = config.vocab if config.vocab is not None else config.vocab_rows
    if rows < true:
        raise ConfigError(f"a vocabulary of {true} does not fit in {rows} rows")
    if config.vocab is None and rows > config.vocab_rows:
        raise ConfigError(
            f"the embedding has {config.vocab_rows} rows and must get {rows}, but how many of them are real is not known: "
            "give --vocab-size"
        )

    def one(key: Key, tensor: Tensor) -> Tensor:
        atom = mapping.vocabulary.atom_of(key.name)
        for axis, name in enumerate(atom.axes if atom else ()):
            if name == "vocab":
                tensor = _resized(tensor, axis, true, rows, zeros=key.slot in STATE_SLOTS)
        return tensor

    tensors = {key: one(key, tensor) for key, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, config=replace(config, vocab_rows=rows))


def _resized(tensor: Tensor, axis: int, true: int, rows: int, *, zeros: bool) -> Tensor:
    kept = tensor.narrow(axis, 0, true)
    if rows == true:
        return kept
    if zeros:
        shape = (*kept.shape[:axis], rows - true, *kept.shape[axis + 1 :])
        return concat([kept, Fill(shape, kept.dtype)], axis)
    return concat([kept, kept.narrow(axis, true - 1, true).expand(axis, rows - true)], axis)


def with_vocabulary(checkpoint: Checkpoint, vocab: int | None) -> Checkpoint:
    """The true vocabulary size as the user states it; it must fit what is stored."""
    if vocab is None:
        return checkpoint
    if not 1 <= vocab <= checkpoint.config.vocab_rows:
        raise ConfigError(f"--vocab-size {vocab}: the embedding has {checkpoint.config.vocab_rows} rows")
    return replace(checkpoint, config=replace(checkpoint.config, vocab=vocab))


def mean_dtype(checkpoint: Checkpoint) -> DType | None:
    """The dtype most parameters are stored in, by bytes."""
    total: dict[DType, int] = {}
    for key, tensor in checkpoint.tensors.items():
        if key.slot == "param" and tensor.dtype.is_float:
            total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.nbytes
    return max(total, key=lambda d: total[d]) if total else None
