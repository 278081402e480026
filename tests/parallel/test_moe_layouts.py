"""Our mixture-of-experts layer equals Megatron's MoELayer in every layout (float32, gloo, torchrun)."""

from pathlib import Path

from ranks import forked

WORKER = Path(__file__).with_name("moe_worker.py")


def test_equals_megatrons_layer_in_every_layout():
    # Tensor x expert ranks of four; in 2x4 the experts are spread over the tensor ranks as well.
    layouts = ["1x1", "1x2", "1x4", "2x2", "2x4"]
    done = forked(4, WORKER, *layouts)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line] == [f"equal: {layout}" for layout in layouts]
