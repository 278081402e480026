"""What a model holds: weights under their Hugging Face names, optimizer state, checkpoints."""
