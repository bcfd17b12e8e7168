"""A folder of rank files to a Stored checkpoint: what both Megatron formats do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv.checkpoint import Extras, Key, Stored
from ckptconv.dialect import detect
from ckptconv.errors import CkptconvError, ConfigError, FormatError
from ckptconv.formats import Request
from ckptconv.mapping import Mapping
from ckptconv.megatron import hf_beside, towers
from ckptconv.megatron.architecture import ADVICE, Evidence, resolve
from ckptconv.megatron.args_read import ArgsLayout, Statement, layout, statement
from ckptconv.megatron.folders import OPTIMIZER_FILES, has_ranks, looks_like, open_ranks
from ckptconv.megatron.grid import Grid, Process, check_processes, make_grid, shared_args
from ckptconv.megatron.measure import LAYER, Measured, Names, measure
from ckptconv.megatron.optimizer.reading import attach
from ckptconv.megatron.rank_file import RankContent, read_rank
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Rank, Topology, even, with_stages


@dataclass(frozen=True, slots=True)
class Kind:
    """What tells formats of rank files apart when reading. `variant` gives what names cannot tell, from the first rank's file;

    `joined` sees shapes as those of one tensor that a form of the dialect cuts in two. `multimodal` are the mappings of models
    that have a language model among other parts, `vision` those of towers alone; `heads` is the number stated for a tower.
    """

    format: str
    mappings: tuple[Mapping, ...]
    names: Names
    variant: Callable[[RankContent], frozenset[str]]
    joined: Callable[[Dict[str, Shape]], dict[str, Shape]] = dict
    multimodal: tuple[Mapping, ...] = ()
    vision: tuple[Mapping, ...] = ()
    heads: int | None = None


def load(path: Path, config: Path | None, request: Request, kind: Kind) -> Stored:
    """Describe the checkpoint from the headers of its rank files."""
    found = open_ranks(path, request.iteration)
    iteration = found.iteration
    contents = [read_rank(file, request.check, kind.mappings[0].rename) for file in found.files]
    args = shared_args(contents, iteration.folder)
    said = None
    if args is not None:
        said = statement(args, f"{iteration.folder.name} args")
        said = replace(said, layout=layout(args, said.where))
    stored = from_ranks(contents, said, hf_beside.find(config, iteration.hf, request), request, kind, iteration.folder)
    if request.training and _resumable(contents, found.optimizer):
        stored = attach(stored, _by_process(stored, contents), check=request.check)
    words = [*stored.extras.state, *(f"distributed optimizer ({name})" for name in found.optimizer)]
    state = [] if stored.extras.training else words
    step = contents[0].iteration if iteration.step is None else iteration.step
    return replace(stored, extras=replace(stored.extras, step=step, objects={"args": args or {}, "state": state}))


def _resumable(contents: Sequence[RankContent], files: Sequence[str]) -> bool:
    """Whether every rank has optimizer state, in a form that is read."""
    return set(files) <= {OPTIMIZER_FILES[0]} and all("optimizer" in content.training for content in contents)


def _by_process(stored: Stored, contents: Sequence[RankContent]) -> dict[Process, RankContent]:
    by_place = {content.where(i): content for content in contents for i in range(len(content.chunks))}
    return {(rank.pp, rank.tp, rank.ep): by_place[place] for rank, place in stored.places.items()}


def from_ranks(
    contents: Sequence[RankContent],
    said: Statement | None,
    beside: hf_beside.Beside,
    request: Request,
    kind: Kind,
    folder: Path,
) -> Stored:
    """The ranks' contents brought together, and the architecture that they and what is said of them agree on."""
    family = hf_beside.family(request)
    stated = towers.Said(beside.config, kind.heads, towers.family_for(family), said.tower if said else None)
    names = contents[0].chunks[0]
    if kind.vision and towers.is_vision(names):
        return _vision(contents, beside, stated, kind, folder)
    multimodal = bool(kind.multimodal) and towers.is_multimodal(names)
    text = towers.split_ranks(contents) if multimodal else contents
    sizes = said.layout if said else ArgsLayout()
    # Megatron's tool that cuts multimodal models into stages leaves the args of the one stage that it started from
    if multimodal:
        sizes = ArgsLayout(sizes.tp, vpp=sizes.vpp, etp=sizes.etp)
    grid = make_grid(text, sizes, kind.names.embed, folder)
    evidence = Evidence(
        _measure(grid, kind), said, beside.config, beside.where, beside.given, family.name if family else None, request.vocab
    )  # fmt: skip
    topology = _topology(grid, evidence)
    architecture, notes = resolve(evidence)
    topology.check(architecture.layers)
    check_processes(grid, topology, folder)
    if multimodal:
        first = next(c for c in contents if c.file == grid.stage(0).file)
        found = towers.towers(_shapes(first.chunks[0]), grid.tp, architecture.towers, stated, str(first.file.path))
        architecture = replace(architecture, towers=found)
    ranks, places = _ranks(replace(grid, contents=_as_stored(grid, contents)), topology)
    candidates = kind.multimodal if multimodal else kind.mappings
    mapping, variant = detect(candidates, architecture, topology, ranks, kind.variant(contents[0]))
    if strays := dict.fromkeys(key for content in contents for key in content.strays):
        notes += (f"left behind in the rank files: {', '.join(strays)}",)
    state = list(dict.fromkeys(word for content in contents for word in content.state))
    extras = Extras(files=beside.files, notes=notes, objects={"state": state})
    return Stored(kind.format, mapping, variant, topology, architecture, ranks, places, extras)


def _as_stored(grid: Grid, contents: Sequence[RankContent]) -> dict[tuple[int, int, int], RankContent]:
    """The grid's processes with all that their files hold."""
    by_file = {content.file: content for content in contents}
    return {process: by_file[content.file] for process, content in grid.contents.items()}


def _vision(
    contents: Sequence[RankContent], beside: hf_beside.Beside, said: towers.Said, kind: Kind, folder: Path
) -> Stored:
    """A vision tower alone: Megatron cuts it for tensor parallelism and nothing else."""
    tp = len(contents)
    odd = [c.file.name for i, c in enumerate(contents) if c.file.numbers != (i,) or len(c.chunks) != 1]
    if odd:
        raise FormatError(
            folder, f"a vision tower lies in mp_rank_00 to mp_rank_{tp - 1:02d}; found {', '.join(odd[:8])}"
        )
    config = towers.vision(_shapes(contents[0].chunks[0]), tp, said, str(contents[0].file.path))
    topology = even(config.layers, tp=tp)
    grid = Grid({(0, i, 0): c for i, c in enumerate(contents)}, tp, 1, 1, 1, [[config.layers]])
    ranks, places = _ranks(grid, topology)
    mapping, variant = detect(kind.vision, config, topology, ranks)
    return Stored(kind.format, mapping, variant, topology, config, ranks, places, Extras(files=beside.files))


def _measure(grid: Grid, kind: Kind) -> Measured:
    """Sizes from one rank of every stage; that the other ranks are alike is found when all tensors are accounted for."""
    stages = [grid.stage(p) for p in range(grid.pp)]
    layers: list[Dict[str, Shape]] = []
    for chunk in range(grid.vpp):
        for content in stages:
            layers += _by_layer(kind.joined(_shapes(content.chunks[chunk])))
    first, last = _shapes(stages[0].chunks[0]), _shapes(stages[-1].chunks[-1])
    measured = measure(first, last, layers, kind.names, grid.tp, grid.ep)
    if not measured.rows:
        raise FormatError(stages[0].file.path, f"the first stage has no {kind.names.embed}")
    return measured


def _shapes(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _by_layer(shapes: Dict[str, Shape]) -> list[dict[str, Shape]]:
    """The shapes of each layer of a chunk, under names without the layer."""
    layers: dict[int, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if match := LAYER.search(name):
            layers.setdefault(int(match[1]), {})[name[match.end() :]] = shape
    return [layers[i] for i in sorted(layers)]


def _topology(grid: Grid, evidence: Evidence) -> Topology:
    """The layout, with expert-tensor parallelism from how much of an expert a rank holds."""
    measured, etp = evidence.measured, grid.tp
    local = measured.local_moe_ffn
    if local:
        said = evidence.said or Statement("", {})
        size = evidence.config.moe_ffn if evidence.config is not None else said.fields.get("moe_ffn")
        if isinstance(size, int) and size % local == 0 and grid.tp % (size // local) == 0:
            etp = size // local
        elif said.layout.etp is not None:
            etp = said.layout.etp
        elif not isinstance(size, int) and grid.tp > 1:
            raise ConfigError(
                f"neither the size of an expert nor its tensor parallel size is stated, and a rank holds {local} of it: {ADVICE}"
            )
        measured.facts["moe_ffn"] = local * etp
    return with_stages(Topology(grid.tp, grid.pp, grid.vpp, grid.ep, etp), grid.counts)


def _ranks(grid: Grid, topology: Topology) -> tuple[dict[Rank, dict[Key, Tensor]], dict[Rank, str]]:
    ranks: dict[Rank, dict[Key, Tensor]] = {}
    places = {}
    for rank in topology.ranks():
        content = grid.contents[rank.pp, rank.tp, rank.ep]
        ranks[rank] = {Key(name): tensor for name, tensor in content.chunks[rank.vpp].items()}
        places[rank] = content.where(rank.vpp)
    return ranks, places


def sniff(path: Path, *, legacy: bool) -> bool:
    """Whether these are rank files, and of which of the two formats; the first file's own names decide."""
    if not path.is_dir() or not looks_like(path, has_ranks):
        return False
    try:
        content = read_rank(open_ranks(path).files[0], False, lambda name: name)
    except CkptconvError:
        return not legacy  # damaged: the loader says what is wrong with it
    names = content.chunks[-1] or content.chunks[0]
    old = any(name.startswith(("language_model.", "word_embeddings")) for name in names)
    return legacy == (old and not towers.is_multimodal(names))
