"""Hypothesis strategies for what tests are about: lazy tensors with the array they stand for, architectures, layouts that fit them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from ckptconv.config import ModelConfig
from ckptconv.dtypes import DTYPES, DType
from ckptconv.leaves import contiguous
from ckptconv.nodes import concat
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Topology, with_stages

Array = NDArray[Any]
Pair = tuple[Tensor, Array]
LARGE = 4096  # entries beyond which nothing is made longer


def dtypes() -> st.SearchStrategy[DType]:
    """Any element type ckptconv knows."""
    return st.sampled_from(list(DTYPES.values()))


def shapes(min_axes: int = 0, max_axes: int = 4, max_side: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, max_side), min_size=min_axes, max_size=max_axes).map(tuple)


@st.composite
def stored_arrays(draw: st.DrawFn, folder: Path, dtype: DType | None = None, min_axes: int = 0) -> Pair:
    """A tensor that is a whole file below `folder`, and the array it holds (as unsigned integers: bits, not values)."""
    kind, shape = dtype or draw(dtypes()), draw(shapes(min_axes))
    seed = draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * kind.itemsize, np.uint8)
    path = folder / f"{kind.name}-{'x'.join(map(str, shape)) or 'scalar'}-{seed}"
    path.write_bytes(bits.tobytes())
    array = bits.view(f"u{kind.itemsize}").reshape(shape)
    return contiguous(Source(str(path), 0, bits.nbytes), shape, kind), array


@st.composite
def tensors(draw: st.DrawFn, folder: Path, dtype: DType | None = None, steps: int = 8) -> Pair:
    """A lazy tensor after some layout methods, and the array it must read as."""
    pair = draw(stored_arrays(folder, dtype))
    for _ in range(draw(st.integers(0, steps))):
        pair = _step(draw, pair)
    return pair


def _step(draw: st.DrawFn, pair: Pair) -> Pair:
    """One layout method on both; what does not apply changes nothing."""
    tensor, array = pair
    if not array.shape:
        return tensor.unsqueeze(0), array[None]
    axis = draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    kind = draw(st.sampled_from(["narrow", "permute", "join", "unfold", "fold", "unsqueeze", "squeeze", "expand"]))
    if kind == "narrow":
        lo = draw(st.integers(0, size - 1))
        hi = draw(st.integers(lo + 1, size))
        return tensor.narrow(axis, lo, hi), array[(slice(None),) * axis + (slice(lo, hi),)]
    if kind == "permute":
        order = draw(st.permutations(range(array.ndim)))
        return tensor.permute(order), array.transpose(order)
    if kind == "join" and array.size < LARGE:
        at = draw(st.integers(0, size))
        halves = [tensor.narrow(axis, at, size), tensor.narrow(axis, 0, at)]
        return concat([h for h in halves if 0 not in h.shape], axis), np.roll(array, -at, axis)
    return _reshaped(draw, pair, kind, axis)


def _reshaped(draw: st.DrawFn, pair: Pair, kind: str, axis: int) -> Pair:
    """Steps that change how many axes there are, or the length of one of size 1."""
    tensor, array = pair
    size = array.shape[axis]
    if kind == "unfold" and array.ndim < 6:
        n = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
        shape = (*array.shape[:axis], n, size // n, *array.shape[axis + 1 :])
        return tensor.unfold(axis, n, size // n), array.reshape(shape)
    if kind == "fold" and axis + 1 < array.ndim:
        shape = (*array.shape[:axis], size * array.shape[axis + 1], *array.shape[axis + 2 :])
        return tensor.fold(axis), array.reshape(shape)
    if kind == "unsqueeze" and array.ndim < 6:
        return tensor.unsqueeze(axis), np.expand_dims(array, axis)
    if kind == "squeeze" and size == 1:
        return tensor.squeeze(axis), array.squeeze(axis)
    if kind == "expand" and size == 1 and array.size < LARGE:
        return tensor.expand(axis, 3), np.repeat(array, 3, axis)
    return pair


@st.composite
def model_configs(draw: st.DrawFn, *, experts: bool | None = None, family: str = "hf-llama") -> ModelConfig:
    """A small architecture that can be: sizes that go together, any mix of what a model may have."""
    kv = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 6))
    moe = draw(st.booleans()) if experts is None else experts
    rows = draw(st.sampled_from([16, 24, 48]))
    sizes: dict[str, Any] = {
        "layers": layers, "hidden": draw(st.sampled_from([8, 12, 32])), "kv_heads": kv,
        "heads": kv * draw(st.sampled_from([1, 2, 3])), "head_dim": draw(st.sampled_from([2, 4, 6])),
        "ffn": draw(st.sampled_from([8, 24, 40])), "vocab_rows": rows, "vocab": draw(st.integers(1, rows)), "max_positions": 8,
    }  # fmt: skip
    flags = ("tied", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "learned_positions", "glu")
    switches: dict[str, Any] = {name: draw(st.booleans()) for name in flags}
    switches["norm"] = draw(st.sampled_from(["rmsnorm", "layernorm"]))
    if moe:
        numbers = st.lists(st.integers(0, layers - 1), min_size=1, unique=True).map(sorted)
        sizes |= {"experts": 4, "moe_ffn": draw(st.sampled_from([8, 16])), "router_topk": 2}
        sizes["moe_layers"] = tuple(draw(numbers))
    return ModelConfig(family=family, **sizes, **switches)


@st.composite
def topologies(draw: st.DrawFn, config: ModelConfig) -> Topology:
    """A layout in which this architecture can be cut: degrees that divide, any split of its layers over stages."""
    tp = draw(st.sampled_from(_dividing([1, 2, 4], [config.kv_heads, config.vocab_rows, config.ffn])))
    ep = draw(st.sampled_from(_dividing([1, 2, 4], [config.experts]))) if config.experts else 1
    etp = draw(st.sampled_from(_dividing([d for d in (1, 2, 4) if tp % d == 0], [config.moe_ffn or tp])))
    pp, vpp = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    cuts = sorted(draw(st.lists(st.integers(0, config.layers), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, config.layers], strict=True)]
    rows = [counts[v * pp : (v + 1) * pp] for v in range(vpp)]
    return with_stages(Topology(tp, pp, vpp, ep, etp), rows)


def _dividing(degrees: Sequence[int], sizes: Sequence[int]) -> list[int]:
    return [d for d in degrees if all(n % d == 0 for n in sizes)]
