"""A Stored checkpoint of whole tensors to the files of a NeMo 2 folder."""

from __future__ import annotations

from collections.abc import Mapping as Dict

from ckptconv.checkpoint import Stored
from ckptconv.containers import torch_write
from ckptconv.dtypes import FP32, UINT8
from ckptconv.errors import ConfigError
from ckptconv.leaves import contiguous
from ckptconv.megatron.dist_loading import COMMON, TELLING
from ckptconv.megatron.dist_objects import objects
from ckptconv.megatron.dist_saving import Filing, layout, telling
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.saving import final_file
from ckptconv.megatron.versions import NEWEST, Core, te_version
from ckptconv.nemo import context_write
from ckptconv.nemo.names import NEMO2
from ckptconv.plan import File, Plan, Segment
from ckptconv.source import Source

WEIGHTS = "weights"


def save(stored: Stored, divisor: int, tokenizer: Dict[str, Source], te: str | None) -> Plan:
    """Weights behind `module.`, then the context. `te` None: for Megatron-Core's own modules."""
    (tensors,) = stored.ranks.values()
    if slots := sorted({key.slot for key in tensors} - {"param"}):
        raise ConfigError(f"optimizer state ({', '.join(slots)}) cannot be written yet: --optimizer drop leaves it out")
    stacked = "l" in stored.mapping.stack
    filing = Filing()
    extra = ExtraState(Core(NEWEST), te_version(te) if te is not None else None, "sequential")
    entries = {NEMO2 + key: value for key, value in objects(stored.config, extra, stacked=stacked).items()}
    named = {NEMO2 + key.name: tensor for key, tensor in tensors.items()}
    places = context_write.tokenizer_places(tokenizer)
    plan = [
        *layout(f"{WEIGHTS}/", named, entries, filing, stacked=stacked),
        torch_write.layout(f"{WEIGHTS}/{COMMON}", _common(stored)),
        *(_copy(name, source) for name, source in places.items()),
        *context_write.files(stored.config, stored.config.dtype or FP32, divisor, tokenizer),
        final_file(f"{WEIGHTS}/{TELLING}", telling(filing.backend)),
    ]
    about: dict[str, object] = {"tokenizer": "put in" if places else "not put in: NeMo needs one to be given"}
    return Plan(tuple(plan), about=about)


def _common(stored: Stored) -> dict[object, object]:
    """What Lightning wants of any checkpoint, for a run that has made no step."""
    step = stored.extras.step if isinstance(stored.extras.step, int) else 0
    return {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.0.0", "state_dict": {}}


def _copy(path: str, source: Source) -> File:
    body = contiguous(source, (source.nbytes,), UINT8)
    return File(path, source.nbytes, (Segment(0, body, path),) if source.nbytes else ())
