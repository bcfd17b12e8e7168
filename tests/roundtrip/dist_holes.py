"""Distributed checkpoints of any size that cost little disk: torch's own metadata and blob headers around weights that are holes."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, TensorWriteData, WriteItem, WriteItemType

Shape = tuple[int, ...]
DTYPE = torch.bfloat16
NOTHING = [None]
ITERATION = "iter_0000001"


@dataclass(frozen=True)
class Mixture:
    """A model with experts in all layers, and the run that saved it: tensor ranks for the rest, expert ranks for experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    ffn: int
    stages: tuple[int, ...]
    tp: int = 8
    ep: int = 64

    @property
    def args(self) -> Namespace:
        return Namespace(
            num_layers=self.layers, hidden_size=self.hidden, ffn_hidden_size=self.ffn, moe_ffn_hidden_size=self.ffn,
            num_attention_heads=self.heads, num_query_groups=self.kv_heads, group_query_attention=True,
            kv_channels=self.head_dim, max_position_embeddings=4096, seq_length=4096, position_embedding_type="rope",
            rotary_base=10000, rotary_percent=1.0, normalization="RMSNorm", norm_epsilon=1e-6, swiglu=True,
            add_bias_linear=False, add_qkv_bias=False, qk_layernorm=False, untie_embeddings_and_output_weights=True,
            num_experts=self.experts, moe_router_topk=8, make_vocab_size_divisible_by=128, padded_vocab_size=self.vocab,
            vocab_size=self.vocab, params_dtype=DTYPE, bf16=True, fp16=False, ckpt_format="torch_dist",
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=len(self.stages),
            expert_model_parallel_size=self.ep, expert_tensor_parallel_size=1,
        )  # fmt: skip


@dataclass
class Writer:
    """A checkpoint as it is put together: one file for each process, chunks of a kind behind each other."""

    folder: Path
    told: dict[str, Any] = field(default_factory=dict)
    stored: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    held: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)  # what is no hole
    plans: dict[int, list[WriteItem]] = field(default_factory=dict)  # of each process: Megatron-Core keeps them all

    def tensor(self, key: str, shape: Shape) -> None:
        self.told[key] = TensorStorageMetadata(TensorProperties(DTYPE), torch.Size(shape), [])

    def chunk(self, process: int, key: str, offset: Sequence[int], shape: Shape) -> None:
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        data = TensorWriteData(chunk, TensorProperties(DTYPE), torch.Size(self.told[key].size))
        index = MetadataIndex(key, chunk.offsets, len(self.told[key].chunks))
        self.told[key].chunks.append(chunk)
        self.plans.setdefault(process, []).append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self._put(process, MetadataIndex(key, torch.Size(offset)), *blob(shape))

    def object(self, process: int, key: str) -> None:
        self.told[key] = BytesStorageMetadata()
        item = WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(nothing())))
        self.plans.setdefault(process, []).append(item)
        self._put(process, MetadataIndex(key), nothing(), 0, b"")

    def _put(self, process: int, index: MetadataIndex, head: bytes, body: int, tail: bytes) -> None:
        name = f"__{process}_0.distcp"
        start = self.sizes.get(name, 0)
        self.sizes[name] = start + len(head) + body + len(tail)
        self.stored[index] = _StorageInfo(name, start, self.sizes[name] - start)
        self.held.setdefault(name, []).extend([(start, head), (start + len(head) + body, tail)])

    def write(self, args: Namespace) -> None:
        self.folder.mkdir(parents=True)
        for name, held in self.held.items():
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT)
            for at, content in _joined(held):
                os.pwrite(fd, content, at)
            os.close(fd)
        metadata = Metadata(self.told, None, self.stored)
        vars(metadata)["all_local_plans"] = [SavePlan(items) for items in self.plans.values()]
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1}, self.folder / "common.pt")
        told = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (self.folder / "metadata.json").write_text(json.dumps(told))


def _joined(held: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """What touches is one piece."""
    start, parts, end = 0, list[bytes](), 0
    for at, content in held:
        if at != end:
            yield start, b"".join(parts)
            start, parts = at, []
        parts.append(content)
        end = at + len(content)
    yield start, b"".join(parts)


@cache
def blob(shape: Shape) -> tuple[bytes, int, bytes]:
    """What torch.save puts before and after the zeros of a tensor, and how many bytes those are."""
    out, tensor = io.BytesIO(), torch.zeros(shape, dtype=DTYPE)
    torch.save(tensor, out)
    data, nbytes = out.getvalue(), tensor.numel() * tensor.element_size()
    with zipfile.ZipFile(out) as archive:
        header = archive.getinfo("archive/data/0").header_offset
    name, extra = (int.from_bytes(data[header + i : header + i + 2], "little") for i in (26, 28))
    at = header + 30 + name + extra
    return data[:at], nbytes, data[at + nbytes :]


@cache
def nothing() -> bytes:
    out = io.BytesIO()
    torch.save(NOTHING, out)
    return out.getvalue()


def write(folder: Path, model: Mixture) -> Path:
    """The checkpoint that Megatron-Core would save of it, layers stacked: every rank's shards, and the objects of TransformerEngine."""
    out = Writer(folder / ITERATION)
    _dense(out, model)
    _experts(out, model)
    out.write(model.args)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


def _placed(model: Mixture) -> Iterator[tuple[int, int]]:
    """(layer, the first process of its stage)."""
    layer = 0
    for stage, count in enumerate(model.stages):
        for _ in range(count):
            yield layer, stage * model.ep
            layer += 1


def _dense(out: Writer, m: Mixture) -> None:
    """What is cut over tensor ranks or not at all."""
    qkv = (m.heads + 2 * m.kv_heads) * m.head_dim
    last = (len(m.stages) - 1) * m.ep
    for key, process in (("embedding.word_embeddings.weight", 0), ("output_layer.weight", last)):
        out.tensor(key, (m.vocab, m.hidden))
        for t in range(m.tp):
            out.chunk(process + t, key, (t * m.vocab // m.tp, 0), (m.vocab // m.tp, m.hidden))
    out.tensor("decoder.final_layernorm.weight", (m.hidden,))
    out.chunk(last, "decoder.final_layernorm.weight", (0,), (m.hidden,))
    for name, shape, cut in (
        ("self_attention.linear_qkv.weight", (qkv, m.hidden), 0),
        ("self_attention.linear_proj.weight", (m.hidden, m.heads * m.head_dim), 1),
        ("self_attention.linear_qkv.layer_norm_weight", (m.hidden,), None),
        ("pre_mlp_layernorm.weight", (m.hidden,), None),
        ("mlp.router.weight", (m.experts, m.hidden), None),
    ):
        key = f"decoder.layers.{name}"
        out.tensor(key, (m.layers, *shape))
        for layer, process in _placed(m):
            for t in range(1 if cut is None else m.tp):
                part = [n // m.tp if axis == cut else n for axis, n in enumerate(shape)]
                offset = [t * n if axis == cut else 0 for axis, n in enumerate(part)]
                out.chunk(process + t, key, (layer, *offset), (1, *part))
    for name in ("linear_qkv", "linear_proj", "core_attention"):
        for layer, process in _placed(m):
            out.object(process, f"decoder.layers.self_attention.{name}._extra_state/shard_{layer}_{m.layers}")


def _experts(out: Writer, m: Mixture) -> None:
    """Each expert of each layer apart; of fc1 the rows of gate and those of up are two chunks."""
    base, each = "decoder.layers.mlp.experts.experts", m.experts // m.ep
    out.tensor(f"{base}.linear_fc1.weight", (m.layers, m.experts, 2 * m.ffn, m.hidden))
    out.tensor(f"{base}.linear_fc2.weight", (m.layers, m.experts, m.hidden, m.ffn))
    for (layer, first), e in product(_placed(m), range(m.experts)):
        process = first + e // each
        for name in ("linear_fc1", "linear_fc2"):
            out.object(process, f"{base}.{name}._extra_state/shard_{layer}.{e}_{m.layers}.{m.experts}")
        for half in (0, 1):
            out.chunk(process, f"{base}.linear_fc1.weight", (layer, e, half * m.ffn, 0), (1, 1, m.ffn, m.hidden))
        out.chunk(process, f"{base}.linear_fc2.weight", (layer, e, 0, 0), (1, 1, m.hidden, m.ffn))
