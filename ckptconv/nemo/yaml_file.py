"""YAML as OmegaConf reads it, but only as plain data: bounded, without tags, one value per key; and what its `${…}` refer to."""

from __future__ import annotations

import re
from collections.abc import Mapping as Dict

import yaml

from ckptconv.errors import FormatError

MAX_BYTES = 4_000_000
MAX_VALUES = 100_000
MAX_DEPTH = 40
MAX_ALIASES = 100
MAX_HOPS = 20
MAX_WORD = 256
_CORE = "tag:yaml.org,2002:"
_PLAIN = {_CORE + name for name in ("str", "int", "float", "bool", "null")}
# numbers such as 1e-5: YAML 1.1 calls them text, OmegaConf (and everybody who writes them) numbers
_EXPONENT = re.compile(r"[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$")
_DIGITS = list("-+0123456789")
_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_PATH = re.compile(r"(\.*)([\w-]+(?:\.[\w-]+)*)$")


class _Loader(yaml.SafeLoader):
    """OmegaConf's rules for plain values: dates stay text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in rules if tag != _CORE + "timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Text that OmegaConf would take for a number is quoted; nothing is abbreviated by an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Loader.add_implicit_resolver(_CORE + "float", _EXPONENT, _DIGITS)
_Dumper.add_implicit_resolver(_CORE + "float", _EXPONENT, _DIGITS)


def dump(table: Dict[str, object]) -> bytes:
    """The file, its keys in their order."""
    return yaml.dump(table, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True).encode()


def read(text: bytes, where: object) -> dict[str, object]:
    """The table that a YAML file holds; references are still text."""
    if len(text) > MAX_BYTES:
        raise FormatError(where, f"has {len(text)} bytes; more than {MAX_BYTES} is no configuration of a model")
    try:
        value = _Builder(text.decode("utf-8-sig"), where).document()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(where, f"is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(value, dict):
        raise FormatError(where, f"holds a {type(value).__name__}, expected a table of keys and values")
    return value


class _Builder:
    """Values from parse events, counted while they come: what is too much is never built."""

    def __init__(self, text: str, where: object) -> None:
        self.loader, self.where = _Loader(text), where
        self.anchors: dict[str, tuple[object, int]] = {}
        self.values = self.aliases = 0

    def document(self) -> object:
        self.take(yaml.StreamStartEvent)
        if self.loader.check_event(yaml.StreamEndEvent):
            raise FormatError(self.where, "is empty")
        self.take(yaml.DocumentStartEvent)
        value = self.value(0)
        self.take(yaml.DocumentEndEvent)
        if not self.loader.check_event(yaml.StreamEndEvent):
            raise FormatError(self.where, "holds more than one document")
        return value

    def take(self, kind: type[yaml.Event]) -> yaml.Event:
        event = self.loader.get_event()  # type: ignore[no-untyped-call]
        if not isinstance(event, kind):
            raise FormatError(self.where, f"{_at(event)}: the YAML does not add up")
        return event

    def value(self, depth: int) -> object:
        event = self.take(yaml.NodeEvent)
        self.count(1, event)
        if depth > MAX_DEPTH:
            raise FormatError(self.where, f"{_at(event)}: values are nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        before = self.values
        if (tag := getattr(event, "tag", None)) is not None:
            raise FormatError(
                self.where, f"{_at(event)}: the tag {tag!r}; a configuration needs none, and none is obeyed"
            )
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(depth)
        else:
            value = self.table(depth)
        if anchor := getattr(event, "anchor", None):
            self.anchors[anchor] = (value, self.values - before + 1)
        return value

    def count(self, more: int, event: yaml.Event) -> None:
        self.values += more
        if self.values > MAX_VALUES:
            raise FormatError(self.where, f"{_at(event)}: more than {MAX_VALUES} values (aliases written out)")

    def alias(self, event: yaml.AliasEvent) -> object:
        self.aliases += 1
        if self.aliases > MAX_ALIASES or event.anchor not in self.anchors:
            problem = (
                f"more than {MAX_ALIASES} aliases" if self.aliases > MAX_ALIASES else "nothing complete is called so"
            )
            raise FormatError(self.where, f"{_at(event)}: the alias *{event.anchor}: {problem}")
        value, size = self.anchors[event.anchor]
        self.count(size, event)
        return value

    def scalar(self, event: yaml.ScalarEvent) -> object:
        tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)  # type: ignore[no-untyped-call]
        if tag not in _PLAIN:
            raise FormatError(self.where, f"{_at(event)}: {event.value[:40]!r} is no plain value ({tag})")
        try:
            value: object = self.loader.construct_object(yaml.ScalarNode(tag, event.value))
        except ValueError as error:
            raise FormatError(self.where, f"{_at(event)}: {event.value[:40]!r}: {str(error)[:100]}") from None
        return value

    def sequence(self, depth: int) -> list[object]:
        items = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            items.append(self.value(depth + 1))
        self.take(yaml.SequenceEndEvent)
        return items

    def table(self, depth: int) -> dict[str, object]:
        table: dict[str, object] = {}
        while not self.loader.check_event(yaml.MappingEndEvent):
            event = self.loader.peek_event()  # type: ignore[no-untyped-call]
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise FormatError(self.where, f"{_at(event)}: a key is {key!r:.60}, expected a name")
            if key in table:
                raise FormatError(self.where, f"{_at(event)}: the key {key!r} is there twice")
            table[key] = self.value(depth + 1)
        self.take(yaml.MappingEndEvent)
        return table


def _at(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}" if event.start_mark else "somewhere"


def resolved(root: Dict[str, object], section: tuple[str, ...], where: object) -> dict[str, object]:
    """A section with every `${key}` (from the root) and `${.key}` (from beside it) replaced by what it refers to."""
    value = _Resolver(root, where).value(_find(root, section), section, 0)
    if not isinstance(value, dict):
        raise FormatError(where, f"{'.'.join(section)} is a {type(value).__name__}, expected a table")
    return value


class _Absent(Exception):
    pass


def _find(root: object, path: tuple[str, ...]) -> object:
    value = root
    for key in path:
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and len(key) < 7 and int(key) < len(value):
            value = value[int(key)]
        else:
            raise _Absent
    return value


class _Resolver:
    def __init__(self, root: Dict[str, object], where: object) -> None:
        self.root, self.where, self.values = root, where, 0

    def value(self, value: object, path: tuple[str, ...], hops: int) -> object:
        """A copy, with references in it replaced; `path` is where it stands, `hops` how many references led there."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise FormatError(self.where, f"{'.'.join(path)}: more than {MAX_VALUES} values (references written out)")
        if len(path) > 2 * MAX_DEPTH:
            raise FormatError(self.where, f"{'.'.join(path)[:80]}: nested too deep (references written out)")
        if isinstance(value, dict):
            return {key: self.value(item, (*path, key), hops) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, (*path, str(i)), hops) for i, item in enumerate(value)]
        return self.text(value, path, hops) if isinstance(value, str) and "${" in value else value

    def text(self, text: str, path: tuple[str, ...], hops: int) -> object:
        if hops >= MAX_HOPS:
            raise self.refusal(text, path, "references lead on and on")
        if "${" in _REFERENCE.sub("", text):
            raise self.refusal(text, path, "only references to plain keys are followed")
        if whole := _REFERENCE.fullmatch(text):
            return self.target(whole[1], text, path, hops)
        return _REFERENCE.sub(lambda found: self.word(found[1], text, path, hops), text)

    def word(self, reference: str, text: str, path: tuple[str, ...], hops: int) -> str:
        value = self.target(reference, text, path, hops)
        if value is None or isinstance(value, (dict, list)) or len(str(value)) > MAX_WORD:
            raise self.refusal(text, path, f"{reference} is no word or number to put into a text")
        return str(value)

    def target(self, reference: str, text: str, path: tuple[str, ...], hops: int) -> object:
        found = _PATH.fullmatch(reference)
        if not found or len(found[1]) > len(path):
            raise self.refusal(text, path, "only references to plain keys are followed")
        base = path[: len(path) - len(found[1])] if found[1] else ()
        wanted = (*base, *found[2].split("."))
        try:
            return self.value(_find(self.root, wanted), wanted, hops + 1)
        except _Absent:
            raise self.refusal(text, path, f"there is no {'.'.join(wanted)}") from None

    def refusal(self, text: str, path: tuple[str, ...], problem: str) -> FormatError:
        return FormatError(self.where, f"{'.'.join(path)} is {text[:80]!r}: {problem}; write the value itself")
