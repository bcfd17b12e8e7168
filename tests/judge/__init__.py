"""The judge: real Megatron-Core models on a CPU, filled with our files by their own `load_state_dict`, compared with transformers."""
