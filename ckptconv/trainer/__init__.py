"""A small parallel trainer that writes and resumes Megatron's checkpoints; it shares no code with the converter, so it can judge it."""
