"""The embedded generator: PyTorch in this process."""
