"""Megatron's distributed checkpoint, torch_dist: whole tensors, of which any layout can read its parts, through torch's own DCP.

All layers of the decoder are one tensor with a leading axis, experts a second; the halves of a gated weight stand one after the
other, each uncut. What is no tensor is in common.pt, from rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ckptconv.trainer.model import named_weights, without_numbers
from ckptconv.trainer.optimizer import Member, Slots, speaks_for
from ckptconv.trainer.parallel import Weight

if TYPE_CHECKING:
    from ckptconv.trainer.run import Run

METADATA = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}'


class Part(NamedTuple):
    """A block of a whole tensor, and the tensor that holds it."""

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor

    @property
    def where(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.offset))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.offset), self.tensor.shape)


class _Save(DefaultSavePlanner):
    """Writes parts where we say they belong."""

    def __init__(self, parts: list[Part], objects: dict[str, object]) -> None:
        super().__init__(flatten_state_dict=False)
        self.held: dict[MetadataIndex, object] = {MetadataIndex(key): value for key, value in objects.items()}
        self.items = [WriteItem(index, WriteItemType.BYTE_IO) for index in self.held]
        for p in parts:
            self.held[p.where] = p.tensor
            data = TensorWriteData(p.chunk, TensorProperties.create_from_tensor(p.tensor), torch.Size(p.whole))
            self.items.append(WriteItem(p.where, WriteItemType.SHARD, tensor_data=data))

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.held[MetadataIndex(index.fqn, index.offset)]


class _Load(DefaultLoadPlanner):
    """Fills parts from whatever blocks the checkpoint has; objects as far as they are there."""

    def __init__(self, parts: list[Part], objects: list[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self.parts, self.wanted = parts, objects
        self.objects: dict[str, Any] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored, items = self.metadata.state_dict_metadata, []
        for p in self.parts:
            found = tuple(getattr(stored.get(p.key), "size", ()))
            if found != p.whole:
                raise ValueError(f"{p.key} has shape {found or None} in the checkpoint, {p.whole} in this model")
            items += create_read_items_for_chunk_list(p.key, stored[p.key], [p.chunk])  # type: ignore[arg-type]
        self.held = {p.where: p.tensor for p in self.parts}
        nowhere = torch.Size([0])
        for index in (MetadataIndex(key) for key in self.wanted if key in stored):
            items.append(ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere))
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.objects[read_item.dest_index.fqn] = torch.load(value, weights_only=False)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.held[MetadataIndex(index.fqn, index.offset)]


def save(run: Run, place: Path, common: dict[str, Any]) -> None:
    t, members = run.config.training, run.optimizer.members
    slots = {w: found for member in members for w, found in member.slots().items()}
    mine = [(name, w) for name, w in _weights(run) if speaks_for(w, run.grid)]
    parts = [p for name, w in mine for p in _tensors(run, name, w, w.detach().to(t.stored), slots)]
    objects = dict(_extra_states(run, mine)) | _rng(run, common.pop("rng_state"))
    state_dict_saver.save({}, storage_writer=FileSystemWriter(place), planner=_Save(parts, objects))
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
    members, kept = () if weights_only else run.optimizer.members, _kept_slots(run).values()
    slots = {w: {slot: torch.zeros(w.shape) for slot in kept} for m in members for w in m.pieces}
    parts = [p for name, w in _weights(run) for p in _tensors(run, name, w, w.data, slots)]
    planner = _Load(parts, list(_rng(run, None)))
    state_dict_loader.load({}, storage_reader=FileSystemReader(place), planner=planner)
    for member in members:
        for w in member.pieces:
            member.restore(w, {"param": w.detach(), **slots[w]}, _steps(common))
    states = list(planner.objects.values())
    return common | ({"rng_state": states[0]} if states else {})


def _weights(run: Run) -> Iterator[tuple[str, Weight]]:
    for chunk in run.chunks:
        yield from named_weights(chunk)


def _kept_slots(run: Run) -> dict[str, str]:
    """What the slots of the optimizer are called in the file. A plain float32 optimizer has no masters but the parameters."""
    t = run.config.training
    master = {"param": "param"} if t.distributed_optimizer else {"fp32_param": "param"} if t.precision == "bf16" else {}
    return master | {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def _tensors(run: Run, name: str, w: Weight, value: Tensor, slots: dict[Weight, Slots]) -> Iterator[Part]:
    """All that is filed of a parameter."""
    yield from _parts(run, name, w, "", value)
    for kept, slot in _kept_slots(run).items() if w in slots else ():
        yield from _parts(run, name, w, f"optimizer.state.{kept}.", slots[w][slot])


def _parts(run: Run, name: str, w: Weight, prefix: str, tensor: Tensor) -> Iterator[Part]:
    """The block of the whole tensor that this rank's tensor is; two of a gated weight."""
    key, counts, numbers = _place(run, name, w)
    for i, part in enumerate(tensor.chunk(w.pieces, w.cut or 0)):
        offset = [0] * part.dim()
        if w.cut is not None:
            offset[w.cut] = i * w.whole[w.cut] // w.pieces + run.grid.tp_rank * part.shape[w.cut]
        block = part.view(*(1 for _ in counts), *part.shape)
        yield Part(prefix + key, (*counts, *w.whole), (*numbers, *offset), block)


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
            shard = ".".join(map(str, numbers or (0,))) + "_" + ".".join(map(str, counts or (1,)))
            yield f"{key}._extra_state/shard_{shard}", [None]


def _rng(run: Run, state: object) -> dict[str, object]:
    """One object per stage and tensor rank; with expert ranks, per data-parallel rank too. Equal ones are written once by DCP."""
    g = run.grid
    at, of = (
        ((g.pp_rank, g.tp_rank), (g.pp, g.tp)) if g.ep == 1 else ((g.pp_rank, g.tp_rank, g.dp_rank), (g.pp, g.tp, g.dp))
    )
    return {f"rng_state/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, of))}": state}


def _state(run: Run, member: Member) -> dict[str, Any]:
    """What of an optimizer is no tensor of the model's shape."""
    groups = member.settings(run.iteration)
    if member.distributed:
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}
    state = {"state": {"common_step": torch.tensor(float(run.iteration))}, "param_groups": groups}
    return {"optimizer": state} if run.config.training.precision == "bf16" else state


def _steps(common: dict[str, Any]) -> int:
    state = common["optimizer"]
    state = state.get(0, state)
    state = state.get("optimizer", state)
    return int(state["state"]["common_step"] if "state" in state else state["param_groups"][0]["step"])
