"""What is particular to NeMo: model_config.yaml, artifacts of an archive, and names of tensors."""
