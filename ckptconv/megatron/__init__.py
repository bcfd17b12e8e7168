"""What the two Megatron formats share: folders, args in both directions, versions, and what the tensors say of the model."""
