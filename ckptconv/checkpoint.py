"""What a checkpoint is, twice: `Stored` (its own names, per rank, as on disk) and `Checkpoint` (canonical names, whole tensors)."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ckptconv.config import ModelConfig
from ckptconv.source import Source
from ckptconv.tensor import Tensor
from ckptconv.topology import Rank, Topology

if TYPE_CHECKING:
    from ckptconv.mapping import Mapping


MASTER, EXP_AVG, EXP_AVG_SQ = STATE = ("master", "exp_avg", "exp_avg_sq")  # Adam's slots, all fp32


class Key(NamedTuple):
    """A tensor's name and what it is of that parameter: the weight itself (`param`), or optimizer state, one of `STATE`.

    `master` is the fp32 copy that the optimizer updates; a weight that is fp32 itself has none.
    """

    name: str
    slot: str = "param"

    def __str__(self) -> str:
        return self.name if self.slot == "param" else f"{self.name} [{self.slot}]"


class Replica(NamedTuple):
    """A tensor stored more than once: the copy kept, another one, and where the other one stands."""

    name: str
    kept: Tensor
    copy: Tensor
    where: str


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a training run needs to go on, beside the weights and their slots. Values are as they were pickled.

    `groups` are the settings of the optimizer's param groups (lr, betas, wd_mult, …): each kind once, whichever rank or
    chained optimizer had it; without `params` (which group a parameter is in follows from the settings), without `step`
    and without `is_expert_parallel` (which follows from the layout). `updates` is how many the optimizer has made: Adam's
    step. `rng` is by process, (pp, tp, ep), and means nothing in another layout. `experts_apart`: experts have an optimizer
    of their own, as with expert parallelism.
    """

    groups: tuple[dict[str, object], ...]
    updates: int
    scheduler: dict[str, object] | None = None
    grad_scaler: dict[str, object] | None = None
    rng: dict[tuple[int, int, int], object] = field(default_factory=dict)
    experts_apart: bool = False


@dataclass(frozen=True, slots=True)
class Extras:
    """What a checkpoint holds beside tensors of the model. `notes` is told to the user and kept in the manifest.

    `training` goes with slots other than `param`: a checkpoint has both or neither. `scratch` are files that reading it has
    made: of no use once it is converted.
    """

    step: int | str | None = None
    files: dict[str, Source] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    training: TrainingState | None = None
    scratch: tuple[str, ...] = ()

    @property
    def state(self) -> tuple[str, ...]:
        """Training state that is there and not taken along, in words."""
        told = self.objects.get("state", ())
        return tuple(map(str, told)) if isinstance(told, list | tuple) else (str(told),)


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint in its own names. `places` says where each rank's tensors lie, for messages; `replicas` are tensors that its
    loader found stored once more, under no name of their own.
    """

    format: str
    mapping: Mapping
    variant: frozenset[str]
    topology: Topology
    config: ModelConfig
    ranks: Dict[Rank, Dict[Key, Tensor]]
    places: Dict[Rank, str] = field(default_factory=dict)
    extras: Extras = field(default_factory=Extras)
    replicas: tuple[Replica, ...] = ()


class Origin(NamedTuple):
    """The form a checkpoint was loaded from; a saver of the same format keeps it unless told otherwise."""

    format: str
    mapping: str
    variant: frozenset[str]
    topology: Topology


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The canonical graph: finest pieces, whole tensors, Hugging Face orientation. `dropped` lists names left out on purpose."""

    config: ModelConfig
    tensors: Dict[Key, Tensor]
    origin: Origin
    extras: Extras = field(default_factory=Extras)
    replicas: tuple[Replica, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """What a saver wants to be given: which names, in which form, cut how, with how many vocabulary rows.

    Rows that it wants beyond the true ones are copies of the last (`vocab_fill` "last") or zeros ("zero"). `heads` are those of
    a vision tower, dummy ones among them (None: as they are). `config` is the architecture with what the source does not tell,
    and `donor` the model to take atoms from that the source has no place for.
    """

    mapping: Mapping
    variant: frozenset[str]
    topology: Topology
    vocab_rows: int
    vocab_fill: str = "last"
    heads: int | None = None
    config: ModelConfig | None = None
    donor: Checkpoint | None = None
