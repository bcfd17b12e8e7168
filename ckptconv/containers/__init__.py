"""File containers as byte ranges: safetensors and torch files, read without running and laid out without writing."""
