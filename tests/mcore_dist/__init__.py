"""Distributed checkpoints of Megatron-Core, read and written by us, against Megatron-Core itself."""
