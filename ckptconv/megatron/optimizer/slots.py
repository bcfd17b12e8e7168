"""All slots of a parameter that is trained: those stored, and those which follow from the weight and from how many updates were made."""

from __future__ import annotations

from collections.abc import Mapping as Dict

from ckptconv.checkpoint import EXP_AVG, EXP_AVG_SQ, MASTER, STATE, Key
from ckptconv.dtypes import FP32
from ckptconv.errors import ConfigError
from ckptconv.nodes import Fill
from ckptconv.tensor import Tensor


def all_slots(held: Dict[Key, Tensor], name: str, updates: int) -> dict[str, Tensor]:
    """An fp32 weight is its own master, and before the first update moments that are not stored are zero; nothing else follows.

    In particular no master from a weight that is narrower: what was rounded away is not known.
    """
    weight = held[Key(name)]
    found: dict[str, Tensor] = {MASTER: weight} if weight.dtype == FP32 else {}
    found |= {slot: held[Key(name, slot)] for slot in STATE if Key(name, slot) in held}
    if not updates and not found.keys() & {EXP_AVG, EXP_AVG_SQ}:
        found |= dict.fromkeys((EXP_AVG, EXP_AVG_SQ), Fill(weight.shape, FP32))
    if lacking := [slot for slot in STATE if slot not in found]:
        raise ConfigError(
            f"{name} ({weight.dtype}) has no {', no '.join(lacking)} after {updates} updates, and args do not say that it is frozen; "
            "--optimizer drop converts the weights alone"
        )
    return found
