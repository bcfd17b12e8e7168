"""The layout a user asks for, given that of the source: degrees that are not said, and the stage table."""

from __future__ import annotations

from dataclasses import dataclass

from ckptconv.errors import TopologyError, UsageError
from ckptconv.topology import Topology, even_counts, with_stages

DEGREES = ("tp", "pp", "vpp", "ep", "etp")


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees as asked for (None: not said), what the source is said to have, and layers per virtual stage."""

    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    ep: int | None = None
    etp: int | None = None
    source: tuple[tuple[str, int], ...] = ()
    pp_layers: tuple[int, ...] = ()

    def check_source(self, topology: Topology) -> None:
        wrong = [
            f"{name} {n} (it has {topology.degree(name)})" for name, n in self.source if topology.degree(name) != n
        ]
        if wrong:
            raise TopologyError(f"the source is not what was said of it: {', '.join(wrong)}")

    def topology(self, layers: int, source: Topology, *, keep: bool) -> Topology:
        """The layout to write. With `keep`, what is not said stays as in the source; without, it is 1."""
        base = source if keep else Topology()
        tp, pp, vpp, ep = (self._degree(name, base) for name in ("tp", "pp", "vpp", "ep"))
        etp = self.etp if self.etp is not None else base.etp if keep and base.etp != base.tp else tp
        topology = Topology(tp, pp, vpp, ep, etp)
        if self.pp_layers:
            counts = self._given(pp, vpp)
        elif keep and (pp, vpp) == (source.pp, source.vpp):
            counts = [[len(source.stages[v * pp + p].layers) for p in range(pp)] for v in range(vpp)]
        else:
            counts = even_counts(layers, pp, vpp)
        result = with_stages(topology, counts)
        result.check(layers)
        return result

    def _degree(self, name: str, base: Topology) -> int:
        value = getattr(self, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be at least 1")
        return int(value if value is not None else base.degree(name))

    def _given(self, pp: int, vpp: int) -> list[list[int]]:
        if len(self.pp_layers) != pp * vpp:
            raise TopologyError(f"--pp-layers has {len(self.pp_layers)} numbers; pp {pp} x vpp {vpp} needs {pp * vpp}")
        return [list(self.pp_layers[i : i + pp]) for i in range(0, pp * vpp, pp)]


def parse_degree(text: str, name: str) -> tuple[int | None, int]:
    """`N`, or `A:B` where A is what the source must have."""
    parts = text.split(":")
    if len(parts) > 2 or not all(p.isdecimal() for p in parts):
        raise UsageError(f"--{name} {text}: expected N, or A:B (from A to B)")
    return (int(parts[0]) if len(parts) == 2 else None), int(parts[-1])


def layout_from(texts: dict[str, str | int | None], pp_layers: str | None = None) -> Layout:
    """A Layout from what was typed: tp="2", pp="1:4", pp_layers="3,5,5,3"."""
    degrees: dict[str, int] = {}
    source: list[tuple[str, int]] = []
    for name, text in texts.items():
        if text is not None:
            was, degrees[name] = parse_degree(str(text), name)
            source += [(name, was)] if was is not None else []
    if pp_layers and not all(n.strip().isdecimal() for n in pp_layers.split(",")):
        raise UsageError(f"--pp-layers {pp_layers}: expected numbers with commas between them")
    counts = tuple(int(n) for n in pp_layers.split(",")) if pp_layers else ()
    return Layout(**degrees, source=tuple(source), pp_layers=counts)
