"""The plug-in point: a format turns a folder into a `Stored` checkpoint, and a `Stored` checkpoint into a `Plan`; pure both ways."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ckptconv.checkpoint import Checkpoint, Stored, Target
from ckptconv.config import ModelConfig
from ckptconv.errors import ConfigError, TopologyError, UsageError
from ckptconv.mapping import Mapping
from ckptconv.plan import Plan
from ckptconv.topology import Topology


@dataclass(frozen=True, slots=True)
class Request:
    """What any loader or saver may be told, whatever its format: the common options of the command line."""

    vocab: int | None = None
    vocab_divisor: int | None = None
    family: str | None = None
    iteration: int | str | None = None
    check: bool = False
    training: bool = False  # state is wanted, not only told
    mappings: tuple[Mapping, ...] = ()
    drop: tuple[str, ...] = ()
    tokenizer: Path | None = None


class Format(Protocol):
    """One on-disk format. `Load` and `Save` are frozen dataclasses: their fields are the flags --loader.x and --saver.x, and
    `options` is an instance of one of them. (Properties here are plain class attributes in a format.)
    """

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def Load(self) -> type: ...  # noqa: N802 - a class, held as an attribute
    @property
    def Save(self) -> type: ...  # noqa: N802

    def sniff(self, path: Path) -> bool:
        """Whether the folder looks like this format, from names and headers alone."""
        ...

    def load(self, path: Path, options: Any, request: Request) -> Stored:
        """Describe what is there without reading a tensor."""
        ...

    def target(self, checkpoint: Checkpoint, topology: Topology, options: Any, request: Request) -> Target:
        """Which mapping, form and layout this format will store the checkpoint in; refuses what it cannot hold."""
        ...

    def save(self, stored: Stored, options: Any, request: Request) -> Plan:
        """The files that hold it, as segments at known offsets."""
        ...

    def usage(self, stored: Stored, dst: str, options: Any) -> str:
        """How the result is loaded by the software it is for."""
        ...


@runtime_checkable
class Storing(Protocol):
    """What a format has besides, if its files hold tensors in chunks: facts for `inspect`, of sound and of damaged ones."""

    def storage(self, path: Path, request: Request) -> dict[str, object]: ...


@runtime_checkable
class Training(Protocol):
    """What a format has besides, if a training run can be continued from its files: it saves optimizer slots and TrainingState."""

    @property
    def trains(self) -> bool: ...


def refuse_more_than_weights(checkpoint: Checkpoint, topology: Topology, request: Request, title: str) -> None:
    """For formats whose files hold a model's weights whole, and nothing else."""
    if request.vocab_divisor is not None:
        raise UsageError(f"--make-vocab-size-divisible-by: {title} files hold the true vocabulary, without padding")
    if any(topology.degree(d) != 1 for d in ("tp", "pp", "vpp", "ep", "etp")):
        raise TopologyError(f"{title} files hold whole tensors: no --tp, --pp, --vpp, --ep or --etp for them")
    if slots := sorted({k.slot for k in checkpoint.tensors} - {"param"}):
        raise ConfigError(f"{title} files have no place for {', '.join(slots)}; --optimizer drop leaves it out")


def refuse_projector_alone(config: ModelConfig, title: str) -> None:
    """For formats of whole models and of towers."""
    if config.kind == "projector":
        raise UsageError(
            f"{title} has no place for a projector alone; --saver mm-projector writes one, and ckptconv combine --projector "
            "joins it to a language model and a vision tower"
        )


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of a side that has none."""


class ReadOnly:
    """The saving half of a format that is only read: it refuses."""

    name = ""
    Save = NoOptions

    def target(self, checkpoint: Checkpoint, topology: Topology, options: Any, request: Request) -> Target:
        raise self._refusal()

    def save(self, stored: Stored, options: Any, request: Request) -> Plan:
        raise self._refusal()

    def usage(self, stored: Stored, dst: str, options: Any) -> str:
        raise self._refusal()

    def _refusal(self) -> UsageError:
        return UsageError(
            f"format {self.name} is only read: convert to another, with --saver FORMAT (see ckptconv formats)"
        )
