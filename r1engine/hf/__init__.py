"""Local Hugging Face folders: what they say and hold, how they are read and written. No Megatron."""
