"""How a stage table is said in Megatron's args: evenly, by first and last stage, with the ends counted, or as a layout string."""

from __future__ import annotations

from itertools import product

from ckptconv.errors import TopologyError
from ckptconv.megatron.versions import Core, show
from ckptconv.topology import Topology, account_counts, even_counts

Counts = list[list[int]]


def counts_of(topology: Topology) -> Counts:
    """Layers per chunk, [vpp][pp]."""
    n = topology.pp
    return [[len(s.layers) for s in topology.stages[v * n : (v + 1) * n]] for v in range(topology.vpp)]


def pipeline_args(topology: Topology, core: Core) -> dict[str, object]:
    """The args that make Megatron build exactly these stages; a table the version has no words for is refused."""
    counts, pp, vpp = counts_of(topology), topology.pp, topology.vpp
    layers = sum(map(sum, counts))
    if vpp > 1 and pp == 1:
        raise TopologyError(
            f"vpp {vpp} with pp 1: Megatron splits stages into virtual ones only where there are several stages"
        )
    if _matches(counts, lambda: even_counts(layers, pp, vpp)):
        return {"num_layers_per_virtual_pipeline_stage": layers // pp // vpp if vpp > 1 else None}
    said = _by_ends(counts, layers, pp, vpp, core) or _by_counting(counts, layers, pp, vpp, core)
    if said is not None:
        return said
    if core.layout_string:
        return {"pipeline_model_parallel_layout": layout_text(counts)}
    raise TopologyError(
        f"Megatron-Core {show(core.version)} cannot be told to put {_show(counts)} layers on its stages: before 0.13 all but the "
        "first and last stage must be equal" + (" (and with vpp every stage)" if core.version < (0, 11) else "")
        + "; choose other --pp-layers or --mcore-version 0.13 or newer"
    )  # fmt: skip


def _by_ends(counts: Counts, layers: int, pp: int, vpp: int, core: Core) -> dict[str, object] | None:
    """A first and a last stage of their own size; with virtual stages only from 0.11 on."""
    if vpp > 1 and core.version < (0, 11):
        return None
    first, last = counts[0][0] * vpp, counts[0][-1] * vpp
    for one, other in ((first, None), (None, last), (first, last)):
        if (one == 0 or other == 0) or (pp == 1 and one and other):
            continue
        if _matches(counts, lambda a=one, b=other: even_counts(layers, pp, vpp, a, b)):
            said: dict[str, object] = {
                "decoder_first_pipeline_num_layers": one,
                "decoder_last_pipeline_num_layers": other,
            }
            return said | ({"num_virtual_stages_per_pipeline_rank": vpp} if vpp > 1 else {})
    return None


def _by_counting(counts: Counts, layers: int, pp: int, vpp: int, core: Core) -> dict[str, object] | None:
    """Embedding and loss each counted as one layer."""
    if not core.counts_ends:
        return None
    for embedding, loss in product((True, False), repeat=2):
        if _matches(counts, lambda e=embedding, o=loss: account_counts(layers, pp, vpp, embedding=e, loss=o)):
            per_chunk = (layers + embedding + loss) // pp // vpp
            return {
                "account_for_embedding_in_pipeline_split": embedding,
                "account_for_loss_in_pipeline_split": loss,
                "num_layers_per_virtual_pipeline_stage": per_chunk if vpp > 1 else None,
            }
    return None


def _matches(counts: Counts, make: object) -> bool:
    try:
        return bool(counts == make())  # type: ignore[operator]
    except TopologyError:
        return False


def layout_text(counts: Counts) -> str:
    """The stages as a layout string, such as `Et*3|t*2|t*2|tL`."""
    stages = [f"t*{n}" if n > 1 else "t" * n for row in counts for n in row]
    stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
    return "|".join(stages)


def _show(counts: Counts) -> str:
    return "; ".join(",".join(map(str, row)) for row in counts)
