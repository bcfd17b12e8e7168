"""What formats refuse whose files hold a model's weights whole, and nothing else."""

from __future__ import annotations

from ckptconv.checkpoint import Checkpoint
from ckptconv.errors import ConfigError, TopologyError, UsageError
from ckptconv.formats import Request
from ckptconv.topology import Topology


def refuse_more(checkpoint: Checkpoint, topology: Topology, request: Request, title: str) -> None:
    if request.vocab_divisor is not None:
        raise UsageError(f"--make-vocab-size-divisible-by: {title} files hold the true vocabulary, without padding")
    if any(topology.degree(d) != 1 for d in ("tp", "pp", "vpp", "ep", "etp")):
        raise TopologyError(f"{title} files hold whole tensors: no --tp, --pp, --vpp, --ep or --etp for them")
    if slots := sorted({k.slot for k in checkpoint.tensors} - {"param"}):
        raise ConfigError(f"{title} files have no place for {', '.join(slots)}; --optimizer drop leaves it out")
