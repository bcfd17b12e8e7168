"""Parts of a model: a language model, a vision tower and a projector joined into one, taken out of one, or swapped in one."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ckptconv.checkpoint import Checkpoint, Extras, Key
from ckptconv.config import COMPUTED, SIGHT, TOWERS, ModelConfig
from ckptconv.errors import ConfigError, UsageError
from ckptconv.mapping_files import families_of_parts, load_mapping
from ckptconv.source import Source

LANGUAGE = "lm"
# files that travel along
CONFIG, PROCESSOR, IMAGES = "config.json", "processor_config.json", "preprocessor_config.json"
OF_WHOLE = (CONFIG, PROCESSOR)
PARTS = (LANGUAGE, *TOWERS)


def parts_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Which parts a checkpoint has; a tower or projector alone is that part."""
    config = checkpoint.config
    return (LANGUAGE if config.kind == "text" else config.kind, *config.towers)


def extract(checkpoint: Checkpoint, part: str) -> Checkpoint:
    """One part of a model as a checkpoint of its own; a part that is alone already is taken as it is."""
    if part not in PARTS:
        raise UsageError(f"part {part!r}: a model's parts are {', '.join(PARTS)}")
    config, held = checkpoint.config, parts_of(checkpoint)
    if held == (part,):
        return checkpoint
    if part not in held:
        raise ConfigError(f"there is no {part} in this model: it has {', '.join(held)}")
    main, under = held[0], "" if part == held[0] else f"{part}."
    own = _language(config) if part == LANGUAGE else replace(config.towers.get(part, config), towers={})
    if part == "projector":  # what it was trained to be given
        own = replace(own, **_of(config, COMPUTED))
    tensors = {
        Key(key.name.removeprefix(under), key.slot): tensor
        for key, tensor in checkpoint.tensors.items()
        if (_owner(key.name) or main) == part
    }
    return replace(checkpoint, config=own, tensors=tensors, extras=_own_extras(checkpoint, own, part))


def _language(config: ModelConfig) -> ModelConfig:
    """The language model of a larger model, which has its own family and its own section of config.json."""
    family = families_of_parts(config.family).get("")
    unseen: dict[str, Any] = dict.fromkeys(SIGHT)
    if family is None:
        return replace(config, towers={}, **unseen)
    part = next(part for part in load_mapping(config.family).parts if not part.scope)
    section = config.raw if part.config == "." else config.raw.get(part.config)
    const = load_mapping(family).config.get("const", {})
    assert isinstance(const, dict)
    named = {key: const[key] for key in ("architectures", "model_type")}
    raw = {**section, **named} if isinstance(section, dict) else {}
    return replace(config, family=family, towers={}, raw=raw, **unseen)


def _own_extras(checkpoint: Checkpoint, own: ModelConfig, part: str) -> Extras:
    """What lies beside, with the part's own config.json in place of the whole model's; the tokenizer is the language model's."""
    extras, whole = checkpoint.extras, checkpoint.config
    if own.kind == "text" and own.family == whole.family:
        return extras
    files = {name: source for name, source in extras.files.items() if _goes_with(part, name)}
    objects = {**extras.objects, **({"hf_config": own.raw} if own.raw else {})}
    return replace(extras, files=files, objects=objects)


def left_behind(found: Dict[str, Source], taken: Dict[str, Source], where: str) -> tuple[str, ...]:
    """A note of the files that are not taken; a config.json is made anew."""
    left = sorted(name for name in found if name not in (*taken, CONFIG))
    return (f"left behind in {where}: {', '.join(left)}",) if left else ()


def _goes_with(part: str, name: str) -> bool:
    return name == IMAGES and part == "vision" if part != LANGUAGE else name not in (*OF_WHOLE, IMAGES)


def combine(language: Checkpoint, vision: Checkpoint, projector: Checkpoint | None) -> Checkpoint:
    """One model of three; what lies beside the weights (step, arguments, tokenizer) is the language model's."""
    found = {LANGUAGE: language, "vision": vision} | ({"projector": projector} if projector else {})
    for part, checkpoint in found.items():
        if parts_of(checkpoint) != (part,):
            raise ConfigError(f"what is given as {part} is {_article(parts_of(checkpoint))}")
    towers = {part: checkpoint.config for part, checkpoint in found.items() if part != LANGUAGE}
    trained_for = _of(projector.config, COMPUTED) if projector else {}
    config = replace(language.config, towers=towers, **trained_for)
    check_fit(config)
    tensors = dict(language.tensors)
    for part in towers:
        tensors |= {Key(f"{part}.{key.name}", key.slot): tensor for key, tensor in found[part].tensors.items()}
    return replace(
        language,
        config=config,
        tensors=tensors,
        extras=_beside(found),
        replicas=tuple(replica for checkpoint in found.values() for replica in checkpoint.replicas),
        dropped=tuple(name for checkpoint in found.values() for name in checkpoint.dropped),
    )


def swap(model: Checkpoint, part: str, other: Checkpoint) -> Checkpoint:
    """The model with one of its parts from another checkpoint, which may be a whole model too."""
    held = parts_of(model)
    if LANGUAGE not in held or len(held) == 1 or "vision" not in (*held, part):
        raise ConfigError(f"a part can only be swapped in a model with a vision tower: this one has {', '.join(held)}")
    parts = {name: extract(model, name) for name in held if name != part} | {part: extract(other, part)}
    joined = combine(parts[LANGUAGE], parts["vision"], parts.get("projector"))
    seen = _of(model.config, SIGHT)
    if part == "projector":  # a new one is given what it was trained with, if that is known
        seen |= {name: value for name, value in _of(parts[part].config, COMPUTED).items() if value is not None}
    joined = replace(joined, config=replace(joined.config, **seen))
    old = _language(model.config) if part == LANGUAGE else model.config.towers.get(part)
    return _as_before(joined, model) if old and old.family == parts[part].config.family else joined


def _as_before(joined: Checkpoint, model: Checkpoint) -> Checkpoint:
    """A model whose parts are of the same families is still what its config.json says it is."""
    files = {
        **joined.extras.files,
        **{name: model.extras.files[name] for name in OF_WHOLE if name in model.extras.files},
    }
    config = replace(joined.config, family=model.config.family, raw=model.config.raw)
    return replace(joined, config=config, extras=replace(joined.extras, files=files))


def check_fit(config: ModelConfig) -> None:
    """The parts' sizes must meet: vision to projector, projector to language model."""
    vision, projector = config.towers.get("vision"), config.towers.get("projector")
    if vision is None or projector is None:
        return
    if projector.hidden != config.hidden:
        raise ConfigError(
            f"the projector gives {projector.hidden} entries, but the language model's hidden size is {config.hidden}"
        )
    if projector.inputs not in (vision.hidden, 4 * vision.hidden):
        raise ConfigError(
            f"the projector takes {projector.inputs} entries, but the vision tower's hidden size is {vision.hidden} "
            f"({4 * vision.hidden} with pixel shuffle)"
        )


def _beside(found: Dict[str, Checkpoint]) -> Extras:
    """The language model's, with what says how images come to the tower; every part's notes and training state are told."""
    extras = found[LANGUAGE].extras
    notes = tuple(note for checkpoint in found.values() for note in checkpoint.extras.notes)
    state = [word for checkpoint in found.values() for word in checkpoint.extras.state]
    of_tower = {name: source for name, source in found["vision"].extras.files.items() if _goes_with("vision", name)}
    files = of_tower | {name: source for name, source in extras.files.items() if name not in of_tower}
    notes += left_behind(found["vision"].extras.files, of_tower, "the vision tower's folder")
    scratch = tuple(path for checkpoint in found.values() for path in checkpoint.extras.scratch)
    objects = {**extras.objects, "state": state}
    return replace(extras, notes=tuple(dict.fromkeys(notes)), files=files, objects=objects, scratch=scratch)


def _owner(name: str) -> str | None:
    """The tower an atom belongs to."""
    first = name.partition(".")[0]
    return first if first in TOWERS else None


def _of(config: ModelConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _article(parts: tuple[str, ...]) -> str:
    names = {LANGUAGE: "a language model", "vision": "a vision tower", "projector": "a projector"}
    return names[parts[0]] if len(parts) == 1 else f"a whole model ({', '.join(parts)})"
