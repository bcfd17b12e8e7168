"""Edits of the canonical graph between import and export: dtype, vocabulary rows, what travels along. Each is a pure function.

Only the mean of rows, where one is asked for, reads bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, Checkpoint, Key, TrainingState
from ckptconv.dtypes import DTYPES, FP32, DType
from ckptconv.errors import ConfigError, CoverageError, UsageError, ValueLossError
from ckptconv.mapping import Mapping
from ckptconv.nodes import Fill, concat
from ckptconv.tensor import Tensor
from ckptconv.values import UINT, Array, Cast

STATE_SLOTS = frozenset({EXP_AVG, EXP_AVG_SQ})  # moments: padded with zeros, never cast
CHUNK = 1 << 22  # bytes read at once for a mean
RowOf = Callable[
    [Key, Tensor, int], Tensor
]  # (name, the true rows, vocabulary axis) -> the one row that new ones repeat


def cast(checkpoint: Checkpoint, dtype: str, mapping: Mapping) -> Checkpoint:
    """All floating-point parameters in one dtype, but for atoms that the vocabulary keeps in another."""
    if dtype == "keep":
        return checkpoint
    if dtype not in DTYPES or not DTYPES[dtype].is_float:
        raise UsageError(f"--dtype {dtype}: expected keep, fp32, bf16 or fp16")
    wanted = DTYPES[dtype]

    tensors = dict(checkpoint.tensors)
    for key, weight in checkpoint.tensors.items():
        if key.slot == "param" and weight.dtype.is_float:
            atom = mapping.vocabulary.atom_of(key.name)
            _cast_one(tensors, key.name, atom.dtype if atom and atom.dtype else wanted, checkpoint.extras.training)
    return replace(checkpoint, tensors=tensors, config=replace(checkpoint.config, dtype=wanted))


def _cast_one(tensors: dict[Key, Tensor], name: str, to: DType, training: TrainingState | None) -> None:
    """A weight in training is rounded from its fp32 master, which a weight of fp32 is itself.

    Before the first update no weight has moments, and which are in training is the format's to know.
    """
    weight, master = tensors[Key(name)], Key(name, MASTER)
    if weight.dtype == to:
        return
    exact = tensors.pop(master, weight)
    tensors[Key(name)] = exact if exact.dtype == to else exact.map(Cast(exact.dtype, to), to)
    trained = training is not None and (not training.updates or Key(name, EXP_AVG) in tensors)
    if to != FP32 and exact.dtype == FP32 and trained:
        tensors[master] = exact


def resize_vocabulary(checkpoint: Checkpoint, rows: int, mapping: Mapping, fill: str = "last") -> Checkpoint:
    """Every vocabulary axis with `rows` entries: padding cut away down to the true size, then rows as `fill` says."""
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

    return _with_rows(checkpoint, rows, FILLS[fill], mapping)


def grow_vocabulary(checkpoint: Checkpoint, rows: int, row_of: RowOf, mapping: Mapping) -> Checkpoint:
    """A true vocabulary of `rows` entries: those it has stay as they are, and each new one is what `row_of` says."""
    config = checkpoint.config
    true = config.vocab if config.vocab is not None else config.vocab_rows
    if rows < true:
        raise ConfigError(f"a vocabulary of {true} cannot grow to {rows} rows")
    grown = _with_rows(checkpoint, rows, row_of, mapping)
    return replace(grown, config=replace(grown.config, vocab=rows))


def last_row(key: Key, kept: Tensor, axis: int) -> Tensor:
    """The last true row, as Megatron's converters pad."""
    return kept.narrow(axis, kept.shape[axis] - 1, kept.shape[axis])


def zero_row(key: Key, kept: Tensor, axis: int) -> Tensor:
    return Fill((*kept.shape[:axis], 1, *kept.shape[axis + 1 :]), kept.dtype)


def mean_row(key: Key, kept: Tensor, axis: int) -> Tensor:
    """The mean of the true rows, as constants.

    It is worked out at once, by reading them: a node for it would have to see a whole tensor to make any part of a row.
    """
    bits = np.ascontiguousarray(mean(key, kept, axis)).view(UINT[kept.dtype.itemsize]).reshape(-1)
    ones = [Fill((1,) * len(kept.shape), kept.dtype, int(bit)) for bit in bits]
    return concat(ones, 1 - axis) if len(ones) > 1 else ones[0]


def mean(key: Key, kept: Tensor, axis: int) -> Array:
    """The mean along one axis, which keeps size 1: summed in fp64, a stretch of rows after the other, and rounded once."""
    if not kept.dtype.is_float:
        raise ConfigError(f"{key} is {kept.dtype}: there is no mean of such values; choose zero or last")
    size = kept.shape[axis]
    step = max(1, CHUNK * size // max(kept.nbytes, 1))
    total = np.zeros((), np.float64)
    for start in range(0, size, step):
        values = kept.narrow(axis, start, min(start + step, size)).numpy()
        total = total + values.astype(np.float64).sum(axis, keepdims=True)
    result = _rounded(total / size, kept.dtype)
    if not np.isfinite(result.astype(np.float64)).all():
        raise ValueLossError(f"{key}: the mean of its rows is not finite: there are infinities or NaN in it")
    return result


def _rounded(exact: Array, dtype: DType) -> Array:
    """fp64 in a narrower type. numpy goes by way of fp32 to some, which would be two roundings: an odd fp32 in between, where
    it is not exact, lies on no border of theirs."""
    if dtype.itemsize >= 4:
        return exact.astype(dtype.numpy)
    near = exact.astype(np.float32)
    near = np.where(np.abs(near) > np.abs(exact), np.nextafter(near, np.float32(0)), near)
    near.view(np.uint32)[...] |= near != exact
    return near.astype(dtype.numpy)


FILLS: dict[str, RowOf] = {"last": last_row, "zero": zero_row, "mean": mean_row}


def vocabulary_axes(key: Key, mapping: Mapping) -> tuple[int, ...]:
    """Which axes of an atom count the words of the vocabulary."""
    atom = mapping.vocabulary.atom_of(key.name)
    return tuple(axis for axis, name in enumerate(atom.axes) if name == "vocab") if atom else ()


def _with_rows(checkpoint: Checkpoint, rows: int, row_of: RowOf, mapping: Mapping) -> Checkpoint:
    config = checkpoint.config
    true = config.vocab if config.vocab is not None else config.vocab_rows

    def one(key: Key, tensor: Tensor) -> Tensor:
        if config.vocab_rows not in tensor.shape:  # most: their names need no looking up
            return tensor
        for axis in vocabulary_axes(key, mapping):
            kept = tensor.narrow(axis, 0, true)
            tensor = kept
            if rows > true:
                row = (zero_row if key.slot in STATE_SLOTS else row_of)(key, kept, axis)
                tensor = concat([kept, row.expand(axis, rows - true)], axis)
        return tensor

    tensors = {key: one(key, tensor) for key, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, config=replace(config, vocab_rows=rows))


def refuse_whole_numbers(checkpoint: Checkpoint) -> None:
    """Weights that are no floating point numbers are quantised: what they mean is not in their bytes."""
    whole = {dtype for dtype in {t.dtype for t in checkpoint.tensors.values()} if not dtype.is_float}
    if whole:
        found = [f"{key} is {tensor.dtype}" for key, tensor in checkpoint.tensors.items() if tensor.dtype in whole]
        raise CoverageError(
            "quantised weights cannot be converted:",
            found,
            "Convert the model as it was before, or leave them out with --drop.",
        )


def with_vocabulary(checkpoint: Checkpoint, vocab: int | None) -> Checkpoint:
    """The true vocabulary size as the user states it; it must fit what is stored."""
    if vocab is None:
        return checkpoint
    if not 1 <= vocab <= checkpoint.config.vocab_rows:
        raise ConfigError(f"--vocab-size {vocab}: the embedding has {checkpoint.config.vocab_rows} rows")
    return replace(checkpoint, config=replace(checkpoint.config, vocab=vocab))


def mean_dtype(checkpoint: Checkpoint) -> DType | None:
    """The dtype most parameters are stored in, by bytes."""
    tensors = [tensor for (_, slot), tensor in checkpoint.tensors.items() if slot == "param"]
    floats = [dtype for dtype in dict.fromkeys(tensor.dtype for tensor in tensors) if dtype.is_float]
    if len(floats) < 2:
        return floats[0] if floats else None
    return max(floats, key=lambda dtype: sum(tensor.nbytes for tensor in tensors if tensor.dtype == dtype))
