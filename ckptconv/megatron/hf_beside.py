"""The Hugging Face side of a Megatron checkpoint: the config given or lying in `hf/`, the family, and files that travel along."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptconv.config import ModelConfig
from ckptconv.containers import json_file
from ckptconv.containers.folder import inside
from ckptconv.errors import UsageError
from ckptconv.formats import Request
from ckptconv.huggingface.family_config import family_named, family_of, own_section, read_config
from ckptconv.huggingface.files import CONFIG, side_files
from ckptconv.huggingface.told import told_fields
from ckptconv.mapping import Mapping
from ckptconv.mapping_files import chosen, families
from ckptconv.source import Source, whole


@dataclass(frozen=True, slots=True)
class Beside:
    """A config and what to call it, and files to carry; all empty when there is neither an option nor an `hf/` folder."""

    config: ModelConfig | None = None
    where: str = ""
    given: bool = False
    files: dict[str, Source] = field(default_factory=dict)


def find(given: Path | None, hf: Path | None, request: Request) -> Beside:
    """The config named by --loader.config, else the one in `hf/`. Side files come from the folder it lies in."""
    path = _given(given) if given is not None else inside(hf, CONFIG) if hf is not None else None
    if path is None:
        return Beside()
    raw = json_file.read(path)
    mapping = family(request) or family_of(raw, [*families(), *request.mappings], str(path))
    folder = path.parent if path.name == CONFIG else None
    files = side_files(folder) if folder is not None else {}
    if given is None and "layers" in told_fields(mapping):  # the family's weights say what it is, no config does
        return Beside(files={**files, CONFIG: whole(str(path))})
    mapping = chosen(mapping.name, request.mappings)
    config = replace(read_config(own_section(raw, mapping), str(path), mapping), family=mapping.name)
    label = "the config given" if given is not None else f"{hf.name if hf else ''}/{CONFIG}"
    return Beside(config, label, given is not None, {**files, CONFIG: whole(str(path))})


def _given(path: Path) -> Path:
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--loader.config {path}: no such file; give a config.json or the folder that holds one")
    return file


def family(request: Request) -> Mapping | None:
    """The mapping of --family NAME (llama or hf-llama), if one was named."""
    return family_named(request.family, request.mappings)
