"""OmegaConf's objects in a pickle, as Lightning saves NeMo's configuration, taken apart as plain data."""

from __future__ import annotations

from collections.abc import Mapping as Dict

from ckptconv.containers.pickled import Global, Known
from ckptconv.containers.plain_calls import Args, Call
from ckptconv.containers.unpickle import Unpickler
from ckptconv.errors import FormatError

MAX_DEPTH, MAX_VALUES = 40, 100_000
_TABLE, _LIST = Global("omegaconf.dictconfig", "DictConfig"), Global("omegaconf.listconfig", "ListConfig")
_NODES = [
    Global("omegaconf.nodes", f"{kind}Node") for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path", "Enum")
]  # fmt: skip


def _known(cls: Global) -> Call:
    """They refer to what holds them, so nothing but this module looks inside."""

    def call(u: Unpickler, args: Args) -> object:
        if args:
            raise ValueError(f"a {cls} takes no arguments")
        return Known(cls)

    return call


CALLS: Dict[Global, Call] = {cls: _known(cls) for cls in (_TABLE, _LIST, *_NODES)}


def plain(value: object, where: object) -> object:
    """The configuration as tables, lists and plain values; references (`${…}`) are still text."""
    return _Plain(where).value(value, 0)


class _Plain:
    def __init__(self, where: object) -> None:
        self.where, self.values = where, 0

    def value(self, value: object, depth: int) -> object:
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise FormatError(
                self.where, f"a configuration nests over {MAX_DEPTH} deep, or holds over {MAX_VALUES} values"
            )
        if isinstance(value, Known):
            fields = value.state if isinstance(value.state, dict) else {}
            return self.value(fields.get("_val") if value.cls in _NODES else fields.get("_content"), depth + 1)
        if isinstance(value, dict):
            return {str(key): self.value(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.value(inner, depth + 1) for inner in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        return str(value)
