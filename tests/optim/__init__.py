"""Optimizer state of rank files: what Megatron-Core saved and resumes."""
