"""How many floating-point operations a SiT needs, counted from its sizes.

A multiply-add is two operations. Counted are matrix products, as is usual for model FLOP utilization (Chowdhery et al.
2022, appendix B): norms, activations and softmax are not, and nothing that is computed a second time.
"""

from __future__ import annotations

from torch import nn

from sitdist.model.sit import PoseEmbedder, SiT, TimestepEmbedder


def forward_flops(model: SiT) -> int:
    """Floating-point operations of one forward pass of one sample."""
    tokens, width = model.pos_embed.shape[1:]
    patch = model.patch_size**2
    embed = tokens * patch * model.in_channels * width + (TimestepEmbedder.frequencies + width) * width
    if model.pose_embedder is not None:
        embed += (16 * (1 + 2 * len(PoseEmbedder.frequencies)) + width) * width
    blocks = 0
    for block in model.blocks:
        of_condition = 6 * width * width
        of_tokens = sum(each.weight.numel() for each in block.modules() if isinstance(each, nn.Linear)) - of_condition
        attention = 2 * tokens * tokens * width
        blocks += tokens * of_tokens + attention + of_condition
    final = tokens * width * patch * model.out_channels + 2 * width * width
    return 2 * (embed + blocks + final)


def training_flops(model: SiT) -> int:
    """Floating-point operations of forward and backward pass of one sample: three times those of the forward pass."""
    return 3 * forward_flops(model)


PEAK_BF16 = {  # dense tensor-core operations a second, from the makers' data sheets; the first name found counts
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "L4": 121e12,
}
TF32_SHARE = 0.5  # of the bf16 rate, on all of these


def listed_peak(device_name: str, precision: str) -> float | None:
    """Peak operations a second of a known GPU in `precision` (fp32 as tf32), or None."""
    peak = next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
    return peak if peak is None or precision != "fp32" else peak * TF32_SHARE
