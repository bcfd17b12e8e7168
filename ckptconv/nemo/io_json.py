"""`io.json`, the graph of calls by which NeMo 2 builds a model again (fiddle's JSON), as a table like that of model.yaml, and back.

Classes and functions are names here; nothing that the file names is imported or called.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from typing import cast

from ckptconv.containers import json_file
from ckptconv.errors import FormatError

NAME = "io.json"
TARGET, CALL = "_target_", "_call_"
VERSION = "0.0.1"  # of fiddle's serialization
MAX_DEPTH, MAX_VALUES = 40, 100_000
_FIDDLE = "fiddle._src.config"
_CALLS = {(_FIDDLE, "Config"), ("fiddle._src.partial", "Partial")}
_LISTS = {("builtins", "list"), ("builtins", "tuple")}
_TABLES = {("builtins", "dict")}
_PLACE = re.compile(r"(?:Attr\(name=|Key\(key=)'(.*)'\)", re.DOTALL)
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

Table = dict[str, object]


def reference(path: str) -> Table:
    """A class or function that is meant itself and not called, as model.yaml has it."""
    return {TARGET: path, CALL: False}


def read(text: bytes, where: str) -> Table:
    """The root object. Calls are tables with a `_target_`, as in model.yaml; what was left to defaults is not in there."""
    root = json_file.parse(text, where)
    objects = root.get("objects")
    if not isinstance(objects, dict) or "root" not in root:
        raise FormatError(where, "is no graph of fiddle objects: expected the keys root and objects")
    value = _Reader(objects, where).value(root["root"], 0)
    if not isinstance(value, dict):
        raise FormatError(where, f"its root is a {type(value).__name__}, expected an object")
    return value


class _Reader:
    """Values from nodes that refer to each other; what refers to itself, or unfolds without end, is an error."""

    def __init__(self, objects: Dict[str, object], where: str) -> None:
        self.objects, self.where, self.values = objects, where, 0

    def value(self, node: object, depth: int) -> object:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise FormatError(self.where, f"nests more than {MAX_DEPTH} deep, or unfolds into over {MAX_VALUES} values")
        match node:
            case {"type": "leaf", "value": value} if not isinstance(value, (dict, list)):
                return value
            case {"type": "pyref", "module": str(module), "name": str(name)}:
                return reference(f"{module}.{name}")
            case {"type": "ref", "key": str(key)} if key in self.objects:
                return self.value(self.objects[key], depth + 1)
            case {"type": {"module": str(module), "name": str(name)}, "items": list(items)}:
                return self.made((module, name), items, cast("Table", node), depth)
        raise FormatError(self.where, f"holds {str(node)[:80]!r}, which is no value of fiddle's, or refers to nothing")

    def made(self, kind: tuple[str, str], items: list[object], node: Table, depth: int) -> object:
        if kind in _LISTS:
            return [self.value(self.pair(item)[1], depth + 1) for item in items]
        filled = {self.word(place): self.value(inner, depth + 1) for place, inner in map(self.pair, items)}
        if kind in _TABLES:
            return filled
        if kind in _CALLS:
            return {TARGET: self.called(node, depth), **filled}
        return {TARGET: ".".join(kind), **filled}

    def called(self, node: Table, depth: int) -> str:
        match self.value(node.get("metadata"), depth + 1):
            case {"fn_or_cls": {"_target_": str(target)}}:
                return target
        raise FormatError(self.where, "has a call that does not say of what")

    def pair(self, item: object) -> tuple[str, object]:
        match item:
            case [str(place), node]:
                # names of arguments stand there bare
                return place, {"type": "leaf", "value": node} if isinstance(node, str) else node
        raise FormatError(self.where, f"has {str(item)[:80]!r} among the items of an object")

    def word(self, place: str) -> str:
        if found := _PLACE.fullmatch(place):
            return found[1]
        raise FormatError(self.where, f"has an item at {place[:80]!r}, expected an attribute or a key")


# -- writing ----------------------------------------------------------------------------------------------------------


def write(root: Table) -> bytes:
    """The graph that fiddle would write of these calls: every object once, what it is made of before it."""
    writer = _Writer()
    top = writer.node(root, "<root>")
    graph = {"root": top, "objects": writer.objects, "refcounts": dict.fromkeys(writer.objects, 1), "version": VERSION}
    return json.dumps(graph).encode()


class _Writer:
    def __init__(self) -> None:
        self.objects: Table = {}
        self.counts: Counter[str] = Counter()

    def node(self, value: object, path: str) -> Table:
        if isinstance(value, dict) and TARGET in value:
            module, _, name = str(value[TARGET]).rpartition(".")
            if value.get(CALL) is False:
                return {**_pyref(module, name), "paths": [path]}
            return self.call(module, name, {k: v for k, v in value.items() if k != TARGET}, path)
        if isinstance(value, dict):
            items = [[f"Key(key={key!r})", self.node(inner, f"{path}[{key!r}]")] for key, inner in value.items()]
            return self.add("dict", "builtins", items, self.keys(value), paths=[path])
        if isinstance(value, list):
            items = [[f"Index(index={i})", self.node(inner, f"{path}[{i}]")] for i, inner in enumerate(value)]
            return self.add("list", "builtins", items, None, paths=[path])
        return {"type": "leaf", "value": value, "paths": [path]}

    def call(self, module: str, name: str, arguments: Table, path: str) -> Table:
        items = [[f"Attr(name={key!r})", self.node(value, f"{path}.{key}")] for key, value in arguments.items()]
        told = [
            ["Attr(name='fn_or_cls')", _pyref(module, name)],
            ["Attr(name='argument_names')", self.keys(arguments)],
            ["Attr(name='argument_tags')", self.add("dict", "builtins", [], self.keys({}))],
            ["Attr(name='argument_history')", self.add("dict", "builtins", [], self.keys({}))],
        ]
        kind = "BuildableTraverserMetadata"
        metadata = self.add(kind, _FIDDLE, told, _pyref(_FIDDLE, kind))
        return self.add("Config", _FIDDLE, items, metadata, paths=[path], called=name)

    def keys(self, table: Table) -> Table:
        """What fiddle keeps of a dict beside its values: its keys, as a tuple; an empty one stands in place."""
        if not table:
            return {"type": _pyref("builtins", "tuple"), "items": [], "metadata": None}
        return self.add("tuple", "builtins", [[f"Index(index={i})", key] for i, key in enumerate(table)], None)

    def add(self, kind: str, module: str, items: Sequence[Sequence[object]], metadata: object, **more: object) -> Table:
        word = _WORD.sub("_", str(more.pop("called", kind))).lower()
        self.counts[word] += 1
        key = f"{word}_{self.counts[word]}"
        self.objects[key] = {"type": _pyref(module, kind), "items": items, "metadata": metadata, **more}
        return {"type": "ref", "key": key}


def _pyref(module: str, name: str) -> Table:
    return {"type": "pyref", "module": module, "name": name}
