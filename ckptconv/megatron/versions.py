"""What Megatron-Core and TransformerEngine of a given version expect of a per-rank checkpoint. Facts with their source, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckptconv.errors import UsageError

TE, LOCAL = "transformer_engine", "local"  # whose modules a model is made of
OLDEST = (0, 9)
NEWEST = (0, 16)
PORTABLE_TE = (2, 0)  # what it stores is read by every 1.x from 1.13 and every 2.x whose source was read (to 2.8)

Version = tuple[int, int]


def core_version(text: str) -> Version:
    """A Megatron-Core version we know, from `0.16`, `0.16.1`, `v0.16` or `core_v0.16.1`."""
    match = re.fullmatch(r"(?:core_)?[vr]?(\d+)\.(\d+)(?:\.\w+)*", text)
    version = (int(match[1]), int(match[2])) if match else None
    if version is None or not OLDEST <= version <= NEWEST:
        raise UsageError(f"--mcore-version {text}: known are {show(OLDEST)} to {show(NEWEST)}")
    return version


def te_version(text: str) -> Version:
    """A TransformerEngine version; those newer than the newest known store the same as it."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.\w+)*", text)
    if not match or (int(match[1]), int(match[2])) < (0, 12):
        raise UsageError(
            f"--saver.te-version {text}: give a version such as {show(PORTABLE_TE)}; 0.12 is the oldest known"
        )
    return int(match[1]), int(match[2])


def show(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


@dataclass(frozen=True, slots=True)
class Core:
    """What one Megatron-Core version can express. No version needs an enum class or `rerun_state_machine` in a weights-only file:

    both are read only where present (`if 'rerun_state_machine' in state_dict`; args enums are never copied by load_args_from_checkpoint).
    """

    version: Version

    @property
    def cuts_assembled_qkv(self) -> bool:
        """tp beyond the query groups: 0.16.0 is the first that cuts the assembled rows; 0.9 to 0.15 raise ValueError."""
        return self.version >= (0, 16)

    @property
    def has_zarr(self) -> bool:
        """Distributed checkpoints in zarr: 0.16 took the code away."""
        return self.version < (0, 16)

    @property
    def rope_scaling(self) -> bool:
        """--use-rope-scaling (Llama 3.1's) came with 0.10; pretrain_gpt.py passes the flag and never the factor, so it is 8."""
        return self.version >= (0, 10)

    @property
    def rope_scaling_factor(self) -> bool:
        return self.version >= (0, 11)

    @property
    def expert_sizes(self) -> bool:
        """--moe-ffn-hidden-size, --moe-layer-freq and --expert-tensor-parallel-size came with 0.10."""
        return self.version >= (0, 10)

    @property
    def counts_ends(self) -> bool:
        """--account-for-embedding-in-pipeline-split and its sibling came with 0.11."""
        return self.version >= (0, 11)

    @property
    def layout_string(self) -> bool:
        """--pipeline-model-parallel-layout came with 0.13."""
        return self.version >= (0, 13)

    @property
    def sliding_window(self) -> bool:
        """--window-size came with 0.15 (before, the config field had no flag)."""
        return self.version >= (0, 15)

    def sequential_experts_are_local(self, te: Version) -> bool:
        """SequentialMLP's linears under TransformerEngine: Megatron's own until 0.11, or with TransformerEngine before 1.7."""
        return self.version < (0, 11) or te < (1, 7)
