"""Which process each rank file is: numbers of folder names, args and contents brought together into degrees of parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptconv.errors import ConfigError, FormatError
from ckptconv.megatron.args_read import ArgsLayout
from ckptconv.megatron.measure import layer_count
from ckptconv.megatron.rank_file import RankContent
from ckptconv.topology import Topology

Process = tuple[int, int, int]  # (pp, tp, ep)
# args that all ranks must agree on: what they say of the model and the layout; the rest may differ (rank, seeds, paths)
SHARED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention", "kv_channels",
    "num_experts", "moe_ffn_hidden_size", "moe_layer_freq", "padded_vocab_size", "vocab_size", "swiglu", "normalization",
    "norm_epsilon", "rotary_base", "position_embedding_type", "untie_embeddings_and_output_weights", "add_bias_linear", "add_qkv_bias",
    "qk_layernorm", "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "pipeline_model_parallel_layout", "model_parallel_size",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """Rank files by process, and the degrees they make; expert-tensor parallelism is found later, from the experts."""

    contents: dict[Process, RankContent]
    tp: int
    pp: int
    vpp: int
    ep: int
    counts: list[list[int]]

    def stage(self, pp: int) -> RankContent:
        """The first process of a pipeline stage."""
        return next(c for process, c in sorted(self.contents.items()) if process[0] == pp)


def shared_args(contents: Sequence[RankContent], folder: object) -> dict[str, object] | None:
    """The args of the checkpoint, the same on every rank in all that matters here."""
    have = [c for c in contents if c.args is not None]
    if have and len(have) != len(contents):
        without = [c.file.name for c in contents if c.args is None]
        raise FormatError(
            folder,
            f"{len(without)} ranks have no args while others do: {', '.join(without[:8])}; are two checkpoints mixed?",
        )
    problems = [f"{what}: {', '.join(sorted(values))}" for what, values in _differences(contents).items()]
    if problems:
        raise FormatError(folder, "\n  ".join(["the ranks do not belong together; they differ in", *problems]))
    return have[0].args if have else None


def _differences(contents: Sequence[RankContent]) -> dict[str, set[str]]:
    seen: dict[str, dict[str, str]] = {}
    for content in contents:
        values: dict[str, object] = {f"args.{k}": (content.args or {}).get(k) for k in SHARED}
        values |= {
            "checkpoint_version": content.version,
            "iteration": content.iteration,
            "model chunks": len(content.chunks),
        }
        for what, value in values.items():
            seen.setdefault(what, {}).setdefault(repr(value)[:60], content.file.name)
    return {what: {f"{v} in {name}" for v, name in found.items()} for what, found in seen.items() if len(found) > 1}


def make_grid(contents: Sequence[RankContent], said: ArgsLayout, embed: str, folder: object) -> Grid:
    """Every process once. A second number in a name is a pipeline or an expert rank: args say which, else who holds the embedding."""
    arity = len(contents[0].file.numbers)
    with_pp, with_ep = _dimensions(contents, arity, said, embed, folder)
    placed = {_process(c.file.numbers, with_pp, with_ep): c for c in contents}
    found = {
        "tp": 1 + max(p[1] for p in placed),
        "pp": 1 + max(p[0] for p in placed),
        "ep": 1 + max(p[2] for p in placed),
    }
    problems = []
    for name, n in found.items():
        stated = getattr(said, name)
        if stated is not None and stated != n:
            problems.append(f"{name}: args say {stated}, the folders are those of {n}")
    vpp = len(contents[0].chunks)
    if said.vpp is not None and said.vpp != vpp:
        problems.append(f"vpp: args say {said.vpp}, the files have {vpp} model chunks")
    if problems:
        listed = ", ".join(c.file.name for c in contents[:16])
        raise FormatError(
            folder,
            "\n  ".join(["rank folders are missing, or are not those of these args:", *problems, f"found {listed}"]),
        )
    counts = _counts(placed, found["pp"], vpp)
    _check_counts(counts, said, folder)
    return Grid(placed, found["tp"], found["pp"], vpp, found["ep"], counts)


def _process(numbers: tuple[int, ...], with_pp: bool, with_ep: bool) -> Process:
    rest = list(numbers[1:])
    pp = rest.pop(0) if with_pp else 0
    ep = rest.pop(0) if with_ep else 0
    return pp, numbers[0], ep


def _dimensions(
    contents: Sequence[RankContent], arity: int, said: ArgsLayout, embed: str, folder: object
) -> tuple[bool, bool]:
    """Whether names carry a pipeline rank, and an expert rank."""
    if arity != 2:
        return arity == 3, arity == 3
    if said.pp is not None or said.ep is not None:
        pp, ep = (said.pp or 1) > 1, (said.ep or 1) > 1
        if pp == ep:
            raise FormatError(
                folder,
                f"folder names carry two numbers, which is one of pipeline and expert parallelism; args say pp {said.pp}, ep {said.ep}",
            )
        return pp, ep
    holders = {c.file.numbers[1] for c in contents if any(embed in chunk for chunk in c.chunks)}
    every = {c.file.numbers[1] for c in contents}
    if holders == every:
        return False, True
    if holders == {0}:
        return True, False
    raise FormatError(
        folder,
        f"there are no args, and whether the second number of {contents[0].file.name} is a pipeline or an expert rank cannot be told: "
        f"{embed} is held by {sorted(holders) or 'none'} of {sorted(every)} (by 0 alone in a pipeline, by all with expert parallelism)",
    )


def _counts(placed: dict[Process, RankContent], pp: int, vpp: int) -> list[list[int]]:
    """Layers per chunk, [vpp][pp]: the same on every rank of a stage."""
    counts = [[-1] * pp for _ in range(vpp)]
    for (stage, _, _), content in sorted(placed.items()):
        for chunk, tensors in enumerate(content.chunks):
            where = f"{content.file.path}: model{chunk if vpp > 1 else ''}"
            n = layer_count(tensors, where)
            if counts[chunk][stage] not in (-1, n):
                raise FormatError(where, f"holds {n} layers, other ranks of this stage {counts[chunk][stage]}")
            counts[chunk][stage] = n
    return counts


def _check_counts(counts: list[list[int]], said: ArgsLayout, folder: object) -> None:
    absent = [str(p) for p in range(len(counts[0])) if counts[0][p] < 0]
    if absent:
        raise FormatError(folder, f"no rank of pipeline stage {', '.join(absent)} is there")
    if said.counts is not None and said.counts != counts:
        raise ConfigError(
            f"{folder}: args put {said.counts} layers on the stages, the files hold {counts} ([chunk][stage])"
        )


def check_processes(grid: Grid, topology: Topology, folder: object) -> None:
    """Exactly the processes that a layout has; their names are those of the folders."""
    wanted = set(topology.processes())
    missing, strays = sorted(wanted - set(grid.contents)), sorted(set(grid.contents) - wanted)
    if missing or strays:
        lines = [f"missing: pp {p} tp {t} ep {e}" for p, t, e in missing[:16]]
        lines += [f"not of this layout: {grid.contents[s].file.name}" for s in strays[:16]]
        layout = " ".join(f"{d} {topology.degree(d)}" for d in ("tp", "pp", "ep", "etp"))
        raise FormatError(folder, "\n  ".join([f"the rank folders are not those of {layout}:", *lines]))
