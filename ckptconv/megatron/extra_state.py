"""`_extra_state` entries beside the weights: which modules have one, what for which TransformerEngine, and if it holds something."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass

from ckptconv.containers.pickled import bytes_io, bytes_of
from ckptconv.containers.unpickle import Unpickler
from ckptconv.dtypes import UINT8
from ckptconv.errors import FormatError
from ckptconv.leaves import full
from ckptconv.megatron.module_order import position
from ckptconv.megatron.versions import Core, Version
from ckptconv.nodes import Fill, concat
from ckptconv.tensor import Tensor

NAME = "_extra_state"
MOST_OF_NOTHING = 1024  # bytes of a pickle: None takes 4, an empty dictionary under 50
_LINEAR = re.compile(r"(?:self_attention|mlp(?:\.experts(?:\.local_experts\.\d+)?)?)\.linear_(?:proj|qkv|fc1|fc2)$")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_NORM = re.compile(r"(?:\.|^)(?:q_layernorm|k_layernorm|pre_mlp_layernorm|final_layernorm)$")
_LEGACY = re.compile(r"\.(?:query_key_value|dense|dense_h_to_4h|dense_4h_to_h|output_layer)$")
_PARAMETER = re.compile(r"\.(?:weight\d*|bias\d*|layer_norm_weight|layer_norm_bias)$")
_NOTHING = concat([full((1,), UINT8, byte) for byte in b"\x80\x04N."], 0)  # a pickle of None


@dataclass(frozen=True, slots=True)
class ExtraState:
    """The entries of one kind of model. `te` None: Megatron's own modules; `legacy`: models before Megatron-Core."""

    core: Core
    te: Version | None
    experts: str = ""
    legacy: bool = False

    def beside(self, tensors: Mapping[str, Tensor], *, last: bool) -> dict[str, object]:
        """The tensors of a chunk with the entries where the modules' state_dict has them; `last`: it has the output layer."""
        if not self.legacy:
            tensors = {name: tensors[name] for name in sorted(tensors, key=position)}
        out: dict[str, object] = {}
        modules = {name: _module(name) for name in tensors}
        ends = {module: name for name, module in modules.items()}
        for name, tensor in tensors.items():
            out |= self._before(name, out)
            out[name] = tensor
            if ends[modules[name]] == name:
                out |= self._after(modules[name])
        if last and not self.legacy:
            out.setdefault(f"output_layer.{NAME}", None)
        return out

    def _before(self, name: str, out: dict[str, object]) -> dict[str, object]:
        """The attention core has no weights; its entry stands first in the attention (TransformerEngine 1.6 and newer)."""
        layer, found, _ = name.partition("self_attention.")
        if not found or self.te is None or self.te < (1, 6):
            return {}
        key = f"{layer}self_attention.core_attention." + ("fused_attention." if self.te < (1, 8) else "") + NAME
        return {} if key in out else {key: self._value()}

    def _after(self, module: str) -> dict[str, object]:
        key = f"{module}.{NAME}"
        if self.legacy:
            return {key: None} if _LEGACY.search(module) else {}
        if module == "output_layer":
            return {key: None}
        if _LINEAR.search(module):
            own = self.te is None or (_EXPERT.search(module) and self.core.sequential_experts_are_local(self.te))
            return {key: None if own else self._value()}
        if _NORM.search(module) and self.te is not None and self.te >= (1, 13):
            return {key: Fill((0,), UINT8)}
        return {}

    def _value(self) -> object:
        """A module without fp8: torch.save(None) in a BytesIO before 2.0, a pickled None as bytes before 2.4, then nothing."""
        assert self.te is not None
        if self.te < (2, 0):
            return bytes_io(saved_none())
        if self.te < (2, 4):
            return copy(_NOTHING)  # a tensor of its own: one met twice would be stored once
        return Fill((0,), UINT8)


def _module(name: str) -> str:
    return _PARAMETER.sub("", name)


def saved_none() -> bytes:
    """What torch.save(None) amounts to: a zip file with a pickle of None, always the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("archive/data.pkl", b"\x80\x02N."), ("archive/version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


# -- reading ----------------------------------------------------------------------------------------------------------


def contents(values: Iterable[object]) -> Iterator[str]:
    """A word for entries that hold something: scaling factors of fp8 training, for which there is no place.

    Of tensors one of each size is opened; what says nothing is as long in every module.
    """
    seen: set[int | bytes] = set()
    for value in values:
        kind = value.nbytes if isinstance(value, Tensor) else bytes_of(value)
        if kind in seen:
            continue
        if holds_something(value):
            yield "_extra_state with contents (fp8 scaling factors)"
            return
        if kind is not None:
            seen.add(kind)


def holds_something(value: object) -> bool:
    """Whether an entry says anything. What cannot be told is taken to; each version has its own way of saying nothing."""
    if isinstance(value, list) and len(value) == 1:  # an object of a distributed checkpoint
        (value,) = value
    if isinstance(value, Tensor):
        return value.nbytes > MOST_OF_NOTHING or (value.nbytes > 0 and _pickled(value.numpy().tobytes()))
    data = bytes_of(value)
    return not _is_nothing(value) if data is None else bool(data) and _saved(data)


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _saved(data: bytes) -> bool:
    """Whether what torch.save wrote, or pickle, holds something."""
    if not data.startswith(b"PK"):
        return len(data) > MOST_OF_NOTHING or _pickled(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [record for record in archive.infolist() if "/data/" in record.filename]
            (pickle,) = (record for record in archive.infolist() if record.filename.endswith("/data.pkl"))
            return bool(records) or pickle.file_size > MOST_OF_NOTHING or _pickled(archive.read(pickle))
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, EOFError, OSError):
        return True


def _pickled(data: bytes) -> bool:
    try:
        return not _is_nothing(Unpickler(data, NAME).load())
    except FormatError:
        return True
