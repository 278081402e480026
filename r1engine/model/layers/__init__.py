"""The modules of the Megatron-core model."""
