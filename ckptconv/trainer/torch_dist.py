"""Megatron's distributed checkpoint, torch_dist: whole tensors, of which any layout can read its parts, through torch's own DCP.

All layers of the decoder are one tensor with a leading axis, experts a second; the halves of a gated weight stand one after the
other, each uncut. What is no tensor is in common.pt, from rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ckptconv.trainer.model import without_numbers
from ckptconv.trainer.optimizer import Member, Slots, speaks_for
from ckptconv.trainer.parallel import Weight

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}'


class Blocks(Tensor):
    """This rank's blocks of a whole tensor that is nowhere, by where they begin; DCP asks for them by these methods."""

    held: dict[torch.Size | None, Tensor]

    def __new__(cls, whole: tuple[int, ...]) -> Self:
        made = torch.empty(1).expand(whole).as_subclass(cls)
        made.held = {}
        return made

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset or ()), block.shape) for offset, block in self.held.items()]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        kind, properties = WriteItemType.SHARD, TensorProperties(next(iter(self.held.values())).dtype)
        data = [TensorWriteData(chunk, properties, self.shape) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(key, d.chunk.offsets), kind, tensor_data=d) for d in data]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.held[index.offset]


def save(run: Run, place: Path, common: dict[str, Any]) -> None:
    t, members = run.config.training, run.optimizer.members
    slots = {w: found for member in members for w, found in member.views(member.gathered()).items()}
    mine = [(name, w) for name, w in run.weights() if speaks_for(w, run.grid)]
    filed = _blocks(run, [(name, w, w.detach().to(t.stored)) for name, w in mine], slots)
    filed |= dict(_extra_states(run, mine)) | {_rng_key(run): [common.pop("rng_state")]}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    state_dict_saver.save(filed, storage_writer=FileSystemWriter(place), planner=planner)
    if dist.get_rank() == 0:
        states = dict(enumerate(_state(run, m) for m in members))
        common["optimizer"] = states[0] if len(states) == 1 else states
        common["content_metadata"] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        if t.distributed_optimizer:
            common["content_metadata"]["distrib_optim_sharding_type"] = "fully_reshardable"
        torch.save(common, place / "common.pt")
        (place / "metadata.json").write_text(METADATA)


def load(run: Run, place: Path, weights_only: bool) -> dict[str, Any]:
    """Fills the model and, unless `weights_only`, the optimizer; what else was saved, with the RNG state if it fits this layout."""
    common: dict[str, Any] = torch.load(place / "common.pt", weights_only=False)
    reader, members = FileSystemReader(place), () if weights_only else run.optimizer.members
    flats = [m.blank(_kept_slots(run).values()) for m in members]
    slots = {w: found for m, f in zip(members, flats, strict=True) for w, found in m.views(f).items()}
    wanted = _blocks(run, [(name, w, w.detach()) for name, w in run.weights()], slots)
    wanted |= dict.fromkeys({_rng_key(run)} & reader.read_metadata().state_dict_metadata.keys())
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    state_dict_loader.load(wanted, storage_reader=reader, planner=planner)
    for member, flat in zip(members, flats, strict=True):
        member.restore(flat, _steps(common["optimizer"]))
    return common | {"rng_state": wanted.get(_rng_key(run), [None])[0]}


def _steps(state: dict[Any, Any]) -> list[float]:
    """The counts of updates that were filed, which need not be by as many members as this layout has."""
    if 0 in state:
        return [step for member in state.values() for step in _steps(member)]
    inner = state.get("optimizer", state)
    told = [inner["state"]["common_step"]] if "state" in inner else [g["step"] for g in inner["param_groups"]]
    return [float(step) for step in told]


def _kept_slots(run: Run) -> dict[str, str]:
    """What the slots of the optimizer are called in the file. A plain float32 optimizer has no masters but the parameters."""
    t = run.config.training
    master = {"param": "param"} if t.distributed_optimizer else {"fp32_param": "param"} if t.precision == "bf16" else {}
    return master | {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def _blocks(run: Run, weights: list[tuple[str, Weight, Tensor]], slots: dict[Weight, Slots]) -> dict[str, Any]:
    """All that is filed of parameters: blocks of whole tensors, two of a gated weight."""
    filed: dict[str, Any] = {}
    for name, w, value in weights:
        key, counts, numbers = _place(run, name, w)
        tensors = {"": value}
        if w in slots:
            tensors |= {f"optimizer.state.{kept}.": slots[w][slot] for kept, slot in _kept_slots(run).items()}
        for prefix, tensor in tensors.items():
            held = filed.setdefault(prefix + key, Blocks((*counts, *w.whole))).held
            for i, part in enumerate(tensor.chunk(w.pieces, w.cut or 0)):
                offset = [0] * part.dim()
                if w.cut is not None:
                    offset[w.cut] = i * w.whole[w.cut] // w.pieces + run.grid.tp_rank * part.shape[w.cut]
                held[torch.Size((*numbers, *offset))] = part.view(*(1 for _ in counts), *part.shape)
    return filed


def _place(run: Run, name: str, w: Weight) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """The key of the whole tensor, how many layers and experts it stacks, and which of them this is."""
    key = without_numbers(name).replace("local_experts", "experts")
    model, vision = run.config.model, run.config.vision
    tower = key.startswith("vision_model.")
    if w.shared:
        key = key.replace("output_layer", "embedding.word_embeddings")
    if not tower:
        key = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        key = key if model.experts else key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    layers = vision.layers if tower and vision else model.layers
    stacked = [(n, count) for n, count in ((w.layer, layers), (w.expert, model.experts)) if n is not None]
    return key, tuple(count for _, count in stacked), tuple(n for n, _ in stacked)


def _extra_states(run: Run, mine: list[tuple[str, Weight]]) -> Iterator[tuple[str, object]]:
    """The linears' empty extra states, one object per layer and expert. Megatron wants them, but for the output layer's."""
    for name, w in mine:
        owner = name.removesuffix(".weight")
        if owner != name and owner.split(".")[-1].startswith("linear_") and run.grid.tp_rank == 0:
            key, counts, numbers = _place(run, owner, w)
            yield f"{key}._extra_state/{_shard(numbers or (0,), counts or (1,))}", [None]


def _rng_key(run: Run) -> str:
    """One object per stage and tensor rank; with expert ranks, per data-parallel rank too. Equal ones are written once by DCP."""
    g, axes = run.grid, 2 if run.grid.ep == 1 else 3
    return f"rng_state/{_shard((g.pp_rank, g.tp_rank, g.dp_rank)[:axes], (g.pp, g.tp, g.dp)[:axes])}"


def _shard(numbers: Sequence[int], counts: Sequence[int]) -> str:
    return f"shard_{'.'.join(map(str, numbers))}_{'.'.join(map(str, counts))}"


def _state(run: Run, member: Member) -> dict[str, Any]:
    """What of an optimizer is no tensor of the model's shape."""
    groups = member.settings()
    if member.distributed:
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
    state = {"state": {"common_step": torch.tensor(float(member.steps))}, "param_groups": groups}
    return {"optimizer": state} if run.config.training.precision == "bf16" else state
