"""The experts that a server chose, out of its answer, in the form that the trainer replays."""

from __future__ import annotations

import base64
import binascii
import math

import numpy as np
import torch

from r1engine.hf.architecture import Architecture
from r1engine.rollout.sglang.client import ServerError


def encoded_bytes(arch: Architecture, num_tokens: int) -> int:
    """Length of the text that `decode_experts` takes, for a sequence of so many tokens."""
    assert arch.moe is not None
    return 4 * math.ceil(4 * (num_tokens - 1) * arch.num_layers * arch.moe.top_k / 3)


def decode_experts(text: str | None, arch: Architecture, num_tokens: int, url: str) -> torch.Tensor:
    """SGLang's `routed_experts` of a whole sequence.

    The server sends base64 of little-endian int32 [T - 1, layers, k]: of all layers, those without experts included,
    and nothing of the last token, which was drawn and never run.

    Args:
        text:       of the answer; None: it had none.
        arch:       of the model, a mixture of experts.
        num_tokens: T, prompt and completion.
        url:        of the server, for errors.

    Returns:
        [T - 1, layers with experts, k] int16.

    Raises:
        ServerError: there is none, or it has another size or experts that do not exist.
    """
    moe = arch.moe
    assert moe is not None
    if text is None:
        raise ServerError(
            f"{url}: the answer has no routed_experts, required with model.routing_replay: start the server with "
            "--enable-return-routed-experts"
        )
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise ServerError(f"{url}: routed_experts is no base64 of int32: {error}") from error
    shape = (num_tokens - 1, arch.num_layers, moe.top_k)
    if flat.size != np.prod(shape):
        raise ServerError(
            f"{url}: routed_experts has {flat.size} entries, required {shape[0]} x {shape[1]} x {shape[2]}"
        )
    experts = torch.from_numpy(flat.reshape(shape)[:, np.array(moe.layers)].astype(np.int16))
    if len(experts) and not (int(experts.min()) >= 0 and int(experts.max()) < moe.num_experts):
        found = f"{int(experts.min())} to {int(experts.max())}"
        raise ServerError(f"{url}: routed_experts names experts {found}, required 0 to {moe.num_experts - 1}")
    return experts
