"""Plain checkpoints of torch.distributed.checkpoint (FSDP, torchtitan, …), read where their tensors have Hugging Face names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from ckptconv.checkpoint import Extras, Key, Stored
from ckptconv.containers import dcp, storage
from ckptconv.dialect import detect
from ckptconv.errors import ConfigError, FormatError
from ckptconv.formats import ReadOnly, Request
from ckptconv.huggingface.family_config import with_rows
from ckptconv.huggingface.files import CONFIG, is_side_file
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen, families
from ckptconv.megatron import hf_beside
from ckptconv.megatron.folders import HF, Iteration, is_plain, looks_like, open_distributed
from ckptconv.topology import Rank, even
from ckptconv.vocabulary import VARIABLE

NAMED = 5  # keys, in a message
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class DcpLoad:
    config: Path | None = field(
        default=None, metadata={"help": "Hugging Face folder or config.json of the model (default: config.json beside)"}
    )
    prefix: str | None = field(
        default=None,
        metadata={"help": "what stands before the model's Hugging Face names, such as model. (default: found)"},
    )


class Dcp(ReadOnly):
    """A folder of `.metadata` and .distcp files without Megatron-Core's; also in the newest of iter_XXXXXXX folders."""

    name = "dcp"
    summary = "PyTorch Distributed Checkpoint with Hugging Face names (FSDP, ...); only read"
    aliases: tuple[str, ...] = ("torch-dcp", "fsdp")
    Load = DcpLoad

    def sniff(self, path: Path) -> bool:
        return path.is_dir() and looks_like(path, is_plain)

    def load(self, path: Path, options: DcpLoad, request: Request) -> Stored:
        iteration = open_distributed(path, request.iteration)
        found = dcp.read(iteration.folder)
        beside = hf_beside.find(options.config, _config_folder(iteration), request)
        if beside.config is None:
            raise ConfigError(_nothing_known(iteration.folder, list(found.tensors), request))
        mapping = chosen(beside.config.family, request.mappings)
        keys = _sort(list(found.tensors), list(found.objects), mapping, options.prefix, iteration.folder)
        if beside.config.layers > len(keys.model):
            told, count = beside.config.layers, len(keys.model)
            raise ConfigError(
                f"{beside.where}: {told} layers, but {iteration.folder} holds only {count} tensors of a model"
            )
        stored = dcp.tensors(found, keys.model.values(), check=request.check)
        tensors = {name: stored[key] for name, key in keys.model.items()}
        config = with_rows(beside.config, tensors, mapping, request.vocab, beside.where)
        topology = even(config.layers)
        ranks = {Rank(): {Key(name): tensor for name, tensor in tensors.items()}}
        mapping, variant = detect([mapping], config, topology, ranks)
        notes = (f"names of the model stand behind {keys.prefix!r}",) if keys.prefix else ()
        extras = Extras(step=iteration.step, files=beside.files, objects={"state": list(keys.state)}, notes=notes)
        places = {Rank(): iteration.folder.name}
        return Stored(self.name, mapping, variant, topology, config, ranks, places, extras)

    def storage(self, path: Path, request: Request) -> dict[str, object]:
        folder = open_distributed(path, request.iteration).folder
        sides = [entry.name for entry in folder.iterdir() if is_side_file(entry.name)]
        return storage.torch_dist(folder, {CONFIG, HF, *sides})


@dataclass(frozen=True, slots=True)
class _Keys:
    """`model`: Hugging Face name -> key; `state`: all the rest, in words."""

    prefix: str
    model: dict[str, str]
    state: tuple[str, ...]


def _config_folder(iteration: Iteration) -> Path | None:
    """The folder whose config.json describes the model: the checkpoint's own, else `hf/` as beside Megatron's."""
    return iteration.folder if (iteration.folder / CONFIG).exists() else iteration.hf


def _nothing_known(folder: Path, keys: list[str], request: Request) -> str:
    """Why there is no architecture, and whether a config could help at all."""
    advice = f"{folder}: no {CONFIG} lies beside, so the architecture is not known; give --loader.config HF_DIR"
    known = {name for family in (*families(), *request.mappings) for name in _patterns(family)}
    named = {key for key, _ in _named(keys, known)}
    strange = [key for key in keys if key not in named]
    if len(strange) < len(keys):
        return advice
    return (
        f"{folder}: none of its {len(keys)} tensors has a Hugging Face name of a known family, so they can be inspected but "
        f"not converted: {_some(strange)}; give a mapping file for them (--mapping FILE --family NAME), and --loader.config"
    )


def _sort(tensors: Sequence[str], objects: Sequence[str], mapping: Mapping, given: str | None, folder: Path) -> _Keys:
    """Which keys are the model's. Where none is told from the rest, all tensors are: they will be listed as unexpected."""
    known = _patterns(mapping)
    prefix = _prefix(tensors, known, folder) if given is None else given
    if prefix is None:
        return _Keys("", {key: key for key in tensors}, ())
    tops = {name.partition(".")[0] for name in known}
    model = {
        key.removeprefix(prefix): key
        for key in tensors
        if key.startswith(prefix) and (prefix or key.partition(".")[0] in tops)
    }
    taken = set(model.values())
    rest = Counter(_group(key, prefix) for key in (*tensors, *objects) if key not in taken)
    return _Keys(prefix, model, tuple(f"{name} ({n} {'entry' if n == 1 else 'entries'})" for name, n in rest.items()))


def _prefix(keys: Iterable[str], known: Collection[str], folder: Path) -> str | None:
    """What stands before the names of a family in most keys; None where no key has one."""
    counts = Counter(head for _, head in _named(keys, known))
    if not counts:
        return None
    most = max(counts.values())
    best = [head for head, count in counts.items() if count == most]
    if len(best) > 1:
        listed = ", ".join(map(repr, best))
        raise FormatError(folder, f"holds the model more than once, behind {listed}: choose one with --loader.prefix")
    return best[0]


def _patterns(mapping: Mapping) -> set[str]:
    """Every name that a family has, its indices written as `#`."""
    return {VARIABLE.sub("#", rule.stored) for rule in mapping.rules}


def _named(keys: Iterable[str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """(key, what stands before the name) for each way in which a key ends in a name of a family."""
    longest = max(name.count(".") + 1 for name in known)
    for key in keys:
        words = key.split(".")
        for count in range(1, min(longest, len(words)) + 1):
            name = ".".join(words[-count:])
            if _NUMBER.sub("#", name) in known:
                yield key, key[: len(key) - len(name)]


def _group(key: str, prefix: str) -> str:
    """The part of a key that says what it belongs to: up to where it parts from the prefix."""
    words = key.split(".")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, prefix.split("."), strict=False)))
    return ".".join(words[: shared + 1])


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
