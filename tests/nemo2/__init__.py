"""The format nemo2, and what Lightning saved, against Megatron-Core, torch and damage."""
