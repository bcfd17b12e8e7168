"""What is in a checkpoint, from headers alone: format, architecture, layout, what each rank holds; and what can be said of a broken one."""

from __future__ import annotations

from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckptconv.canonicalize import canonicalize
from ckptconv.checkpoint import Checkpoint, Stored
from ckptconv.config import ModelConfig
from ckptconv.errors import CkptconvError, UsageError
from ckptconv.formats import Storing
from ckptconv.passes import mean_dtype
from ckptconv.pipeline import Job, load_stored
from ckptconv.registry import get_format, sniff

VOCABULARY = ("embed.weight", "head.weight")  # what padding rows are found in
EXPERTS = "experts_"  # how the forms of experts are called, which say nothing of a model that has none

Facts = dict[str, object]


def inspect(job: Job, pattern: str | None = None) -> tuple[Facts, CkptconvError | None]:
    """(what was found, what is wrong with it). A checkpoint too broken to load is told file by file."""
    storage = _storage(job)
    try:
        stored = load_stored(job.source, job.loader, job.loader_options, job.request())[1]
    except UsageError:
        raise
    except CkptconvError as error:
        return {"path": job.source.name, **(storage or {"files": _files(job.source)})}, error
    facts = {**describe(stored, pattern), **storage}
    try:
        checkpoint = canonicalize(stored, job.drop)
    except CkptconvError as error:
        return facts, error
    if stored.config.dtype is None:  # nothing says it: what most weights have
        facts["architecture"] = _architecture(replace(stored.config, dtype=mean_dtype(checkpoint)))
    facts["parameters"] = _parameters(checkpoint)
    facts["replicas_to_check"] = len(checkpoint.replicas)
    facts["ignored"] = list(checkpoint.dropped)
    return facts, None


def _storage(job: Job) -> Facts:
    """The format, and how tensors are filed, where the format has a say in that; nothing where not even that can be told."""
    try:
        fmt = get_format(job.loader) if job.loader and job.loader != "auto" else sniff(job.source)
        if not isinstance(fmt, Storing):
            return {}
        return {"format": fmt.name, "storage": fmt.storage(job.source, job.request())}
    except UsageError:
        raise
    except (CkptconvError, OSError):
        return {}  # loading will say why


def _parameters(checkpoint: Checkpoint) -> int:
    """How many numbers the model has; rows that only pad the vocabulary are none of it."""
    padded, true = checkpoint.config.vocab_rows, checkpoint.config.vocab or checkpoint.config.vocab_rows
    total = 0
    for key, tensor in checkpoint.tensors.items():
        count = tensor.nbytes // tensor.dtype.itemsize if key.slot == "param" else 0
        total += count * true // padded if key.name in VOCABULARY and tensor.shape[0] == padded else count
    return total


def describe(stored: Stored, pattern: str | None = None) -> Facts:
    """A stored checkpoint as plain data."""
    ranks = []
    for rank, tensors in stored.ranks.items():
        row: Facts = {
            "rank": rank._asdict(),
            "place": stored.places.get(rank, ""),
            "layers": list(stored.topology.stage(rank).layers),
            "tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors.values()),
            "dtypes": sorted({t.dtype.name for t in tensors.values()}),
        }
        if pattern is not None:
            row["listed"] = {
                str(k): f"{t.dtype} {list(t.shape)}" for k, t in tensors.items() if fnmatchcase(k.name, pattern)
            }
        ranks.append(row)
    topology = stored.topology
    return {
        "format": stored.format,
        "mapping": stored.mapping.name,
        "form": sorted(tag for tag in stored.variant if stored.config.experts or not tag.startswith(EXPERTS)),
        "family": stored.config.family,
        "step": stored.extras.step,
        "layout": {name: topology.degree(name) for name in ("tp", "pp", "vpp", "ep", "etp")},
        "architecture": _architecture(stored.config),
        "ranks": ranks,
        "state": list(stored.extras.state),
        "notes": list(stored.extras.notes),
    }


def _architecture(config: ModelConfig) -> Facts:
    facts = {
        k: v
        for k, v in asdict(config).items()
        if k not in ("raw", "towers", "dtype", "family") and v not in (None, 0, False, ())
    }
    facts["dtype"] = config.dtype.name if config.dtype else None
    return facts


def _files(path: Path) -> list[Facts]:
    """Every file below a folder, and what reading its header says."""
    from ckptconv.containers import safetensors, torch_file

    rows: list[Facts] = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file():
        row: Facts = {"file": str(file.relative_to(path)) if file != path else file.name, "bytes": file.stat().st_size}
        try:
            if file.suffix == ".safetensors":
                row["tensors"] = len(safetensors.read(file).tensors)
            elif file.suffix in (".pt", ".bin"):
                torch_file.read(file)
                row["readable"] = True
        except (CkptconvError, OSError) as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows
