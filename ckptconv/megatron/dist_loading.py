"""A distributed checkpoint (torch_dist, zarr) to a Stored one: whole tensors, whichever ranks wrote them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from pathlib import Path

from ckptconv.checkpoint import Extras, Key, Stored
from ckptconv.containers import dcp, dcp_flat, json_file, torch_file, zarr2
from ckptconv.dialect import detect
from ckptconv.errors import FormatError, UsageError
from ckptconv.formats import Request
from ckptconv.mapping_files import chosen
from ckptconv.megatron import dist_optim, extra_state, hf_beside, towers
from ckptconv.megatron.architecture import Evidence, resolve
from ckptconv.megatron.args_read import Statement, statement
from ckptconv.megatron.dist_keys import is_separate, measure_whole, one_by_one, sort_keys
from ckptconv.megatron.folders import open_distributed
from ckptconv.megatron.rank_file import KNOWN, args_of, state_of, step_of
from ckptconv.tensor import Shape, Tensor
from ckptconv.topology import Rank, even

COMMON, TELLING = "common.pt", "metadata.json"
COMMON_STATE = "common_state/shard_0_1"
TORCH_DIST, ZARR = "torch_dist", "zarr"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backend found: shapes and objects by key, how to get at them, and (`unused`) bytes that are neither."""

    shapes: Dict[str, Shape]
    objects: Dict[str, int]  # key -> bytes
    tensors: Callable[[list[str]], dict[str, Tensor]]
    value: Callable[[str], object]
    unused: tuple[str, ...] = ()


FORMS = {True: ("mcore-dist", "mcore-dist-singleton"), False: ("mcore-dist-stacked",)}  # by whether layers have names
MULTIMODAL = {True: ("mcore-dist-vlm",), False: ("mcore-dist-vlm-stacked",)}


def load(
    path: Path,
    config: Path | None,
    request: Request,
    format_name: str,
    zarr_missing: str = "fill",
    heads: int | None = None,
) -> Stored:
    """Describe the checkpoint from its metadata and the headers of its blobs. `heads`: those of its vision tower, where stated."""
    iteration = open_distributed(path, request.iteration)
    folder = iteration.folder
    if backend(folder) == ZARR:
        contents = of_zarr(zarr2.read(folder), missing=zarr_missing)
    elif zarr_missing != "fill":
        raise UsageError(f"--loader.zarr-missing {zarr_missing}: {folder} is no zarr checkpoint")
    else:
        contents = of_torch_dist(dcp.read(folder), check=request.check)
    common, place = _common(folder, contents)
    args = args_of(common, folder / place)
    said = statement(args, f"{place} args") if args is not None else None
    beside = hf_beside.find(config, iteration.hf, request)
    stored = from_whole(contents, said, beside, request, str(folder), format_name, heads)
    extras = stored.extras
    strays = sorted(str(k)[:60] for k in common if k not in KNOWN)
    notes = (*extras.notes, *((f"left behind in {place}: {', '.join(strays)}",) if strays else ()))
    state = list(dict.fromkeys([*state_of(common), *extras.state]))
    step = step_of(common, folder / place) if iteration.step is None else iteration.step
    objects: dict[str, object] = {"args": args or {}, "backend": backend(folder), "state": state}
    stored = replace(stored, extras=replace(extras, step=step, notes=notes, objects=objects))
    if request.training and dist_optim.is_there(contents):
        return dist_optim.attach(stored, contents, common, request, str(folder))
    return stored


def from_whole(
    contents: Contents,
    said: Statement | None,
    beside: hf_beside.Beside,
    request: Request,
    where: str,
    format_name: str,
    heads: int | None = None,
) -> Stored:
    """Whole tensors, and the architecture that they and what is said of them agree on."""
    keys = sort_keys(contents.shapes, (key for key in contents.objects if key != COMMON_STATE))
    multimodal = towers.is_multimodal(keys.model)
    shapes = {key: contents.shapes[key] for key in keys.model}
    measured = measure_whole(towers.under(towers.LANGUAGE, shapes) if multimodal else shapes)
    if not measured.rows:
        raise FormatError(where, "has no embedding.word_embeddings.weight: it is no language model of Megatron-Core")
    family = hf_beside.family(request)
    notes: tuple[str, ...] = ()
    if said is not None and said.rows not in (None, measured.rows):
        # Megatron-Core pads or cuts the vocabulary when it loads a distributed checkpoint: this is no contradiction
        notes = (f"padded_vocab_size: {said.where} say {said.rows}, the embedding has {measured.rows} rows",)
        said = replace(said, rows=None)
    name = family.name if family else None
    evidence = Evidence(measured, said, beside.config, beside.where, beside.given, name, request.vocab)
    architecture, overruled = resolve(evidence)
    if multimodal:
        stated = towers.Said(None, heads, towers.family_for(family), said.tower if said else None)
        found = towers.towers(one_by_one(shapes), 1, architecture.towers, stated, where)
        architecture = replace(architecture, towers=found)
    topology = even(architecture.layers)
    ranks = {Rank(): {Key(name): tensor for name, tensor in contents.tensors(list(keys.model)).items()}}
    known = (MULTIMODAL if multimodal else FORMS)[is_separate(keys.model)]
    forms = [chosen(form, request.mappings) for form in known]
    mapping, variant = detect(forms, architecture, topology, ranks)
    strays = [*keys.strays, *contents.unused]
    by_size = {contents.objects[key]: key for key in keys.extra}  # what says nothing is as long in every layer
    strays += extra_state.contents(contents.value(key) for key in by_size.values())
    notes += (*overruled, *((f"left behind: {', '.join(strays)}",) if strays else ()))
    extras = Extras(files=beside.files, notes=notes, objects={"state": list(keys.state)})
    return Stored(format_name, mapping, variant, topology, architecture, ranks, {Rank(): Path(where).name}, extras)


def backend(folder: Path) -> str:
    """What `metadata.json` says the tensors are stored as; torch's own files have none."""
    told = folder / TELLING
    if not told.exists():
        return TORCH_DIST
    name = json_file.read(told).get("sharded_backend")
    if name not in (TORCH_DIST, ZARR):
        raise FormatError(told, f"sharded_backend is {name!r}; known are {TORCH_DIST} and {ZARR}")
    return str(name)


def of_torch_dist(found: dcp.Dcp, *, check: bool) -> Contents:
    """`check` verifies the checksums of what is read. Tensors that were stored flat are as they were before."""

    def tensors(keys: list[str]) -> dict[str, Tensor]:
        stored, flat = dcp.tensors(found, keys, check=check), found.reformulated
        return {k: dcp_flat.restored(t, flat[k], f"{found.where} {k}") if k in flat else t for k, t in stored.items()}

    return Contents(
        {key: found.reformulated.get(key, entry.shape) for key, entry in found.tensors.items()},
        {key: item.nbytes for key, item in found.objects.items()},
        tensors,
        lambda key: dcp.value(found.objects[key], check=check),
        tuple(f"{source.nbytes:,} bytes of {Path(source.path).name}" for source in found.unused),
    )


def of_zarr(found: zarr2.Zarr, *, missing: str = "fill") -> Contents:
    """Chunks have no checksums of their own to verify."""
    return Contents(
        {key: entry.shape for key, entry in found.tensors.items()},
        {key: source.nbytes for key, source in found.objects.items()},
        lambda keys: zarr2.tensors(found, keys, missing="zero" if missing == "zero" else "fill"),
        lambda key: torch_file.read(found.objects[key]),
    )


def _common(folder: Path, contents: Contents) -> tuple[dict[object, object], str]:
    """What is not cut over ranks, and where it lies: a file, or from 0.19 on an object; files of torch alone have neither."""
    saved: object = {}
    place = COMMON
    if (folder / COMMON).exists():
        saved = torch_file.read(folder / COMMON)
    elif COMMON_STATE in contents.objects:
        listed, place = contents.value(COMMON_STATE), COMMON_STATE
        saved = listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
    if not isinstance(saved, dict):
        raise FormatError(folder / place, f"holds a {type(saved).__name__}, expected a dictionary")
    return saved, place
