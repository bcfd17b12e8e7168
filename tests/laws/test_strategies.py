"""The shipped strategies, put to use: random recipes read as numpy says, and random models in random layouts come back leaf for leaf."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.canonicalize import canonicalize
from ckptconv.dialect import variants
from ckptconv.errors import CoverageError
from ckptconv.mapping_files import load_mapping
from ckptconv.moves import Reader
from ckptconv.testing.mapping_contract import stored, whole
from ckptconv.testing.strategies import model_configs, tensors, topologies


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_recipe_reads_as_numpy_says(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tensor, array = data.draw(tensors(tmp_path_factory.getbasetemp()))
    assert tensor.shape == array.shape
    assert tensor.numpy().tobytes() == np.ascontiguousarray(array).tobytes()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_part_of_a_recipe_can_be_read_alone(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Elements of one byte too: where they lie apart, they are no run of bytes."""
    tensor, array = data.draw(tensors(tmp_path_factory.getbasetemp()))
    item = tensor.dtype.itemsize
    lo = data.draw(st.integers(0, array.size - 1)) * item
    hi = data.draw(st.integers(lo // item + 1, array.size)) * item
    out = np.empty(hi - lo, np.uint8)
    with Reader() as reader:
        reader.fill(tensor.lower(), out, lo)
    assert out.tobytes() == np.ascontiguousarray(array).tobytes()[lo:hi]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(["mcore", "mcore-local", "megatron-legacy"]))
def test_random_model_in_a_random_layout_comes_back_leaf_for_leaf(data: st.DataObject, name: str) -> None:
    config = data.draw(model_configs(experts=False if name == "megatron-legacy" else None))
    topology, mapping = data.draw(topologies(config)), load_mapping(name)
    variant = data.draw(st.sampled_from(variants(mapping)))
    checkpoint = whole(mapping, config)
    if name == "megatron-legacy" and config.qk_norm:
        with pytest.raises(CoverageError):
            stored(checkpoint, mapping, variant, topology)
        return
    topology.check(config.layers)
    back = canonicalize(stored(checkpoint, mapping, variant, topology))
    assert back.tensors == checkpoint.tensors
    assert not back.replicas
