"""The data-only unpickler against Python's own: the same values, protocol by protocol, and inert ones for classes."""

from __future__ import annotations

import collections
import datetime as dt
import math
import pickle
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptconv.containers.pickled import Global, Namespace, Opaque, Ordered
from ckptconv.containers.pickler import Pickler
from ckptconv.containers.unpickle import Unpickler

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
KEYS = st.text() | st.integers(-(2**63), 2**63) | st.booleans() | st.tuples(st.text(), st.integers(-5, 5))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(KEYS, inner)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.binary().map(bytearray)
    ),
    max_leaves=20,
)


def load(data: bytes) -> object:
    return Unpickler(data, "x").load()


def plain(value: Any) -> str:
    """A text in which NaNs compare equal and sets have an order."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(map(repr, value))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}{[plain(v) for v in value]}"
    return f"{{{[(k, plain(v)) for k, v in value.items()]}}}" if isinstance(value, dict) else repr(value)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers(2, 5))
def test_plain_data_of_every_protocol(value: Any, protocol: int) -> None:
    assert plain(load(pickle.dumps(value, protocol))) == plain(value)


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_what_we_pickle_python_loads(value: Any) -> None:
    data = Pickler("x").dump(value)
    assert plain(pickle.loads(data)) == plain(value)
    assert plain(load(data)) == plain(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_become_inert(protocol: int) -> None:
    value = [Fraction(1, 2), collections.deque([1, 2]), collections.Counter("aab"), dt.timedelta(1), Fraction]
    loaded = load(pickle.dumps(value, protocol))
    assert isinstance(loaded, list)
    assert loaded[0] == Opaque("fractions", "Fraction", loaded[0].args)
    assert (loaded[1].name, loaded[1].items) == ("deque", [1, 2])
    assert (loaded[2].name, loaded[2].args) == ("Counter", ({"a": 2, "b": 1},))
    assert loaded[3] == Opaque("datetime", "timedelta", (1, 0, 0))
    assert loaded[4] == Global("fractions", "Fraction")


def test_default_dict_keeps_its_pairs() -> None:
    loaded = load(pickle.dumps(collections.defaultdict(list, {"a": [1]}), 2))
    assert loaded == Opaque("collections", "defaultdict", (Global("__builtin__", "list"),), pairs=[("a", [1])])


def test_shared_values_stay_shared() -> None:
    inner: list[int] = [1]
    loaded = load(pickle.dumps({"a": inner, "b": inner}, 2))
    assert isinstance(loaded, dict)
    assert loaded["a"] is loaded["b"]


def test_inert_objects_are_pickled_back_as_they_were() -> None:
    value = Opaque("m.n", "C", (1, "x"), state={"a": 1}, items=[2], pairs=[("k", 3)], new=True)
    assert load(Pickler("x", ["m.n.C"]).dump([value, value])) == [value, value]


def test_namespace_and_ordered_are_pickled_back() -> None:
    ordered: Ordered[object, object] = Ordered({"b": 1, "a": 2})
    ordered.attributes = {"_metadata": {"": {"version": 1}}}
    loaded = load(Pickler("x").dump({"args": Namespace(a=1, b=[2]), "state": ordered}))
    assert isinstance(loaded, dict)
    assert loaded["args"] == Namespace(a=1, b=[2])
    assert list(loaded["state"]) == ["b", "a"]
    assert loaded["state"].attributes == ordered.attributes


def test_position_is_behind_the_pickle() -> None:
    data = pickle.dumps(1, 2)
    unpickler = Unpickler(data + b"rest", "x")
    assert unpickler.load() == 1
    assert unpickler.pos == len(data)


def test_special_floats() -> None:
    loaded = load(pickle.dumps([math.inf, -math.inf, math.nan, -0.0], 2))
    assert repr(loaded) == "[inf, -inf, nan, -0.0]"
