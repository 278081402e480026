"""FAKE, see the package: what all modules keep."""

import pickle

import torch


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self._fp8_workspaces = {}  # quantized copies of the weights
        self.fp8_meta = {}

    def get_extra_state(self):
        """A tensor of bytes: none before FP8 was used, then what the recipe was, as version 2.11 writes it."""
        if not self.fp8_meta:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.fp8_meta)), dtype=torch.uint8)

    def set_extra_state(self, state):
        if state is not None and state.numel():
            self.fp8_meta = pickle.loads(state.numpy().tobytes())


def get_dummy_wgrad(shape, dtype, zero=False):
    return torch.zeros(shape, dtype=dtype)
