"""Context-parallel attention by flash-attn, fewer queries than keys, against SDPA in float64. `pytest -m gpu`."""

import pytest
import torch

from r1engine.batch import RowShape, Sequence, pack
from r1engine.model.layers.attention import packed_attention, row_layout
from r1engine.model.layers.context import share_of_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("lengths", [[1024], [5, 300, 1, 70, 2, 640, 6], [129, 127, 128, 640]])
@pytest.mark.parametrize("ranks", [2, 4])
def test_flash_attention_of_a_share_is_that_of_sdpa(lengths, ranks):
    row = pack([Sequence([2] * n, 0, 1.0) for n in lengths], RowShape(max_tokens=1024))[0][0]
    random = torch.Generator().manual_seed(1)
    q, k, v, slope = (torch.randn(1024, heads, 64, generator=random).bfloat16() for heads in (8, 2, 2, 8))
    for rank in range(ranks):
        outputs, gradients = [], []
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
            here = row.to(torch.device(device))
            share = share_of_row(here.cu_seqlens, rank, ranks, None)
            layout = row_layout(here, torch.ones(4, device=device), dtype, share=share)
            inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
            out = packed_attention(inputs[0][share.index], *inputs[1:], layout, scale=0.125)
            outputs.append(out)
            gradients.append(torch.autograd.grad((out * slope.to(device, dtype)[share.index]).sum(), inputs))
        torch.testing.assert_close(outputs[0].cpu().double(), outputs[1], rtol=2e-2, atol=2e-2)
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found.cpu().double(), expected, rtol=5e-2, atol=5e-2)
