"""A Stored checkpoint to the files of a Megatron folder: one per process, the tracker file, and Hugging Face files in `hf/`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import dataclass

from ckptconv.checkpoint import Extras, Stored
from ckptconv.config import ModelConfig
from ckptconv.containers import torch_write
from ckptconv.containers.pickled import Namespace, Ordered
from ckptconv.dtypes import FP32, UINT8
from ckptconv.errors import ConfigError, UsageError
from ckptconv.formats import Request
from ckptconv.huggingface.files import CONFIG, is_side_file
from ckptconv.leaves import contiguous
from ckptconv.megatron.args_table import Subject
from ckptconv.megatron.args_write import notes, write_args
from ckptconv.megatron.extra_state import NAME as EXTRA_STATE
from ckptconv.megatron.extra_state import ExtraState
from ckptconv.megatron.folders import FILES, HF, OPTIMIZER_FILES, RELEASE, TRACKER, iteration_name, rank_name
from ckptconv.megatron.grid import Process
from ckptconv.megatron.optimizer import generators
from ckptconv.megatron.optimizer.writing import Filing, Writer
from ckptconv.megatron.towers import with_extra_state
from ckptconv.megatron.versions import Core, show
from ckptconv.plan import File, Plan, Segment
from ckptconv.source import Source
from ckptconv.topology import Rank, Topology

DIVISOR = 128  # Megatron's own default of --make-vocab-size-divisible-by
MOST_DIVISOR = 1 << 20  # what is larger than any vocabulary is no divisor but damage
CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True, slots=True)
class Form:
    """Which software the files are for, and in which of its forms."""

    core: Core
    extra: ExtraState
    local: bool = False
    experts: str = ""
    legacy: bool = False
    ckpt_format: str = "torch"
    distributed: bool | None = None  # optimizer; None: as in the source

    @property
    def whole(self) -> bool:
        """Whether tensors are whole, in a distributed checkpoint."""
        return self.ckpt_format != "torch"

    def written(self, stored: Stored) -> frozenset[str]:
        """What of the training state the files hold."""
        training = stored.extras.training
        if training is None:
            return frozenset()
        asked = self.distributed
        distributed = carried(stored.extras).get("use_distributed_optimizer") is True if asked is None else asked
        held = {"optimizer": True, "distributed": distributed, "rng": generators.kept(stored, distributed=self.whole)}
        return frozenset(name for name, there in held.items() if there)


def divisor(extras: Extras, request: Request) -> int:
    """What the vocabulary is padded to a multiple of, per tensor rank."""
    if request.vocab_divisor is not None:
        if not 1 <= request.vocab_divisor <= MOST_DIVISOR:
            raise UsageError(f"--make-vocab-size-divisible-by {request.vocab_divisor}: expected 1 to {MOST_DIVISOR}")
        return request.vocab_divisor
    own = carried(extras).get("make_vocab_size_divisible_by")
    return own if isinstance(own, int) and not isinstance(own, bool) and 1 <= own <= MOST_DIVISOR else DIVISOR


def carried(extras: Extras) -> dict[str, object]:
    """The args of a Megatron source."""
    args = extras.objects.get("args")
    return args if isinstance(args, dict) else {}


def vocab_rows(config: ModelConfig, topology: Topology, multiple: int) -> int:
    """Rows of the embedding as Megatron pads them; left as they are when the true size is not known and they can be cut."""
    if config.vocab is not None:
        step = multiple * topology.tp
        return -(-config.vocab // step) * step
    if config.vocab_rows % topology.tp:
        raise ConfigError(
            f"the embedding's {config.vocab_rows} rows cannot be cut for tp {topology.tp}, and how many of them are real is not known: "
            "give --vocab-size"
        )
    return config.vocab_rows


def vocab_notes(stored: Stored, request: Request) -> tuple[str, ...]:
    """What becomes of a wish for other padding where the true size is not known: rows that do not meet it are refused."""
    config, asked = stored.config, request.vocab_divisor
    if asked is None or config.vocab is not None or config.kind != "text":
        return ()
    step = asked * stored.topology.tp
    said = f"--make-vocab-size-divisible-by {asked}: how many of the embedding's {config.vocab_rows} rows are real is not known"
    if config.vocab_rows % step:
        raise ConfigError(f"{said}, and they are no multiple of {asked} x tp {stored.topology.tp}: give --vocab-size")
    return () if config.vocab_rows == step else (f"{said}, so they are left as they are; --vocab-size tells it",)


def save(stored: Stored, wanted: int | str | None, request: Request, form: Form) -> Plan:
    """All files. The tracker is written last: a folder without it is no checkpoint to Megatron."""
    refuse_half_a_state(stored)
    step = step_to_write(wanted, stored.extras.step)
    subject = Subject(
        stored.config, stored.topology, form.core, stored.config.dtype or FP32, divisor(stored.extras, request), form.local,
        form.legacy, form.experts, carried=carried(stored.extras), written=form.written(stored),
    )  # fmt: skip
    args = None if stored.config.kind == "vision" else write_args(subject)
    files = [*_rank_files(stored, args, step, form), *hf_files(stored.extras), final_file(TRACKER, str(step).encode())]
    about: dict[str, object] = {
        "iteration": step,
        "mcore_version": show(form.core.version),
        "format_notes": [
            *notes(stored.config, form.core, legacy=form.legacy),
            *vocab_notes(stored, request),
            *generators.left_out(stored, distributed=False),
        ],
    }
    return Plan(tuple(files), about=about)


def refuse_half_a_state(stored: Stored) -> None:
    """Slots without the settings that go with them would be lost."""
    slots = sorted({key.slot for tensors in stored.ranks.values() for key in tensors} - {"param"})
    if slots and stored.extras.training is None:
        raise ConfigError(
            f"there is optimizer state ({', '.join(slots)}), but no param groups and no count of updates go with it: "
            "a run cannot go on from that; --optimizer drop leaves it out"
        )


def step_to_write(wanted: int | str | None, source: int | str | None) -> int | str:
    """The iteration as asked for, else the source's, else the first."""
    step = wanted if wanted is not None else source if source is not None else 1
    if step == RELEASE:
        return RELEASE
    if not re.fullmatch(r"\d{1,12}", str(step)):
        raise UsageError(f"--saver.iteration {step}: give a number, or the word {RELEASE}")
    return int(step)


def _rank_files(stored: Stored, args: Namespace | None, step: int | str, form: Form) -> Iterator[File]:
    """Of each process its args and model chunks; with training state also that, and the file of flat buffers if there is one.

    A vision tower alone has no args: Megatron only ever joins it to a language model, which has.
    """
    chunks = {process: _chunks(stored, process, form) for process in stored.topology.processes()}
    head: dict[object, object] = {}
    if args is not None:
        iteration = 0 if step == RELEASE else step
        head = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
    writer = _writer(stored, chunks, form) if stored.extras.training else None
    for process, models in chunks.items():
        folder = f"{iteration_name(step)}/{_folder(stored.topology, process)}"
        names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
        saved = dict(head)
        for name, model in zip(names, models, strict=True):
            saved[name] = nested(model) if form.legacy else Ordered(model)
        saved |= writer.beside(process) if writer else {}
        yield torch_write.layout(f"{folder}/{FILES[0]}", saved)
        if writer and (flat := writer.flat(process)) is not None:
            yield torch_write.layout(f"{folder}/{OPTIMIZER_FILES[0]}", flat)


def _chunks(stored: Stored, process: Process, form: Form) -> list[dict[str, object]]:
    """A process's model chunks, with the entries that the modules' state_dict has beside weights."""
    topology = stored.topology
    pp, tp, ep = process
    chunks = []
    for vpp in range(topology.vpp):
        rank = Rank(pp, tp, ep, vpp, tp % topology.etp)
        tensors = {key.name: tensor for key, tensor in stored.ranks[rank].items() if key.slot == "param"}
        chunks.append(with_extra_state(form.extra, tensors, last="head" in topology.stage(rank).roles))
    return chunks


def _writer(stored: Stored, chunks: Dict[Process, list[dict[str, object]]], form: Form) -> Writer:
    """The optimizer numbers parameters as they stand in the model."""
    names = {
        process: [[name for name in model if not name.endswith(EXTRA_STATE)] for model in models]
        for process, models in chunks.items()
    }
    return Writer(stored, names, Filing(form.core, "distributed" in form.written(stored), carried(stored.extras)))


def _folder(topology: Topology, process: Process) -> str:
    pp, tp, ep = process
    return rank_name(tp, pp if topology.pp > 1 else None, ep if topology.ep > 1 else None)


def nested(flat: Dict[str, object]) -> dict[object, object]:
    """Dotted names as the dictionaries of legacy models: everything of the encoder is one flat dictionary."""
    model: dict[object, object] = {}
    for name, value in flat.items():
        table = model
        *path, leaf = _split(name)
        for part in path:
            below = table.setdefault(part, {})
            assert isinstance(below, dict)
            table = below
        table[leaf] = value
    return model


def _split(name: str) -> list[str]:
    head, found, rest = name.partition("language_model.encoder.")
    return ["language_model", "encoder", rest] if found and not head else name.split(".")


def hf_files(extras: Extras) -> list[File]:
    """The Hugging Face files that travel along, in `hf/`."""
    files = sorted(extras.files.items())
    return [_copy(name, source) for name, source in files if is_side_file(name) or name == CONFIG]


def final_file(path: str, text: bytes) -> File:
    return File(path, len(text), (Segment(0, text),), final=True)


def _copy(name: str, source: Source) -> File:
    body = contiguous(source, (source.nbytes,), UINT8)
    return File(f"{HF}/{name}", source.nbytes, (Segment(0, body, name),) if source.nbytes else ())
