"""Everything that touches Megatron-core: parallel layout, model construction, weights, optimizer, checkpoints."""
