"""What plug-in authors test with: contracts, tiny checkpoints, strategies; nothing in the core imports it."""
