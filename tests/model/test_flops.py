"""The analytic count of operations against torch's own counter, and a count by hand."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sitdist.model.flops import forward_flops, listed_peak, training_flops
from sitdist.model.sit import SiT


def counted(model, batch, backward):
    """What torch counts for `batch` samples; the plain attention kernel, which it knows on every device."""
    size = int(model.pos_embed.shape[1] ** 0.5) * model.patch_size
    x = torch.randn(batch, model.in_channels, size, size, requires_grad=backward)
    pose = torch.randn(batch, 4, 4) if model.pose_embedder is not None else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(x, torch.rand(batch), torch.zeros(batch, dtype=torch.int64), pose=pose)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 4},
        {"depth": 3, "mlp_ratio": 2.0},
        {"learn_sigma": True},
        {"pose_condition": True},
        {"mlp": "swiglu"},
    ],
)
def test_the_forward_count_is_that_of_torch(options):
    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = SiT(**(sizes | options))
    assert forward_flops(model) == counted(model, 1, backward=False)
    assert 3 * forward_flops(model) == counted(model, 3, backward=False)


def test_the_training_count_is_that_of_torch_but_for_inputs_that_need_no_gradient():
    model = SiT(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=4, num_heads=2)
    unneeded = 2 * model.t_embedder.frequencies * 64  # the gradient by the waves of t, which nobody asks for
    assert counted(model, 1, backward=True) == training_flops(model) - unneeded


def test_the_published_gflops_of_xl_2_at_256_tokens():
    """Peebles & Xie 2023, table 4: 118.64 G multiply-adds for DiT-XL/2 at 32x32 latents."""
    with torch.device("meta"):
        model = SiT(32, 2, 4, 1152, 28, 16, num_classes=1000, learn_sigma=True)
    assert forward_flops(model) / 2 == pytest.approx(118.64e9, rel=0.005)


def test_the_peak_of_a_device_goes_by_its_name_and_precision():
    assert listed_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert listed_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert listed_peak("NVIDIA H100 80GB HBM3", "fp32") == 494.5e12
    assert listed_peak("some other card", "bf16") is None
