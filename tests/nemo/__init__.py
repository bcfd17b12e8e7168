"""The format nemo against NeMo's own files, Megatron-Core, and damage."""
