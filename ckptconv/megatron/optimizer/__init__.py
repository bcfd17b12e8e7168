"""Optimizer state in Megatron's rank files: as lists by parameter number, and as flat buffers of the distributed optimizer."""
