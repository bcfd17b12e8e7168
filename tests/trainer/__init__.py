"""Tests of the reference trainer by itself: against transformers, against Megatron's own files, and against itself spread otherwise."""
