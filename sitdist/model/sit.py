"""The Scalable Interpolant Transformer (Ma et al. 2024; blocks of DiT, Peebles & Xie 2023) on timm layers.

State dicts are interchangeable with the published SiT code.
"""

from __future__ import annotations

import math

import torch
from timm.layers import GELUTanh, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention import Attention
from torch import Tensor, nn

from sitdist.errors import ConfigError


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Affine change of tokens [B, T, D] by a per-sample shift and scale [B, D]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """t in [0, 1], [B], to [B, D]: 128 cosines and sines, then a two-layer perceptron."""

    frequencies = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)  # [B, 128]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves)


class LabelEmbedder(nn.Module):
    """Labels [B] to [B, D]; where labels may be dropped, one more row stands for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.may_drop = num_classes, dropout_prob > 0
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor, drop_labels: Tensor | None = None) -> Tensor:
        if drop_labels is not None:
            if not self.may_drop:
                raise ConfigError(
                    "model.class_dropout_prob = 0: trained without dropping labels, the model has no velocity without "
                    "a label and cannot be guided; train it with class_dropout_prob above 0"
                )
            y = torch.where(drop_labels, torch.full_like(y, self.num_classes), y)
        return self.embedding_table(y)


class PoseEmbedder(nn.Module):
    """Packed poses [B, 4, 4] to [B, D]: the entries with their cosines and sines, then a two-layer perceptron."""

    frequencies = (1.0, 2.0, 4.0, 8.0)  # radians per standard deviation

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        features = 16 * (1 + 2 * len(self.frequencies))
        self.mlp = nn.Sequential(nn.Linear(features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, packed_pose: Tensor) -> Tensor:
        entries = packed_pose.float().flatten(1)  # [B, 16]
        angles = [frequency * entries for frequency in self.frequencies]
        waves = [wave for angle in angles for wave in (angle.cos(), angle.sin())]
        return self.mlp(torch.cat([entries, *waves], dim=1))


class SelfAttention(Attention):
    """timm's attention over tokens [B, T, D], with bf16 products only where they pay.

    On a CPU the products are in float32: the backward pass of torch's bf16 kernel takes ten times as long there.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        qkv = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        )  # [3, B, heads, T, d]
        if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
            qkv = qkv.float()
        with torch.autocast(qkv.device.type, enabled=False):
            out = nn.functional.scaled_dot_product_attention(*qkv)
        return self.proj(out.transpose(1, 2).flatten(2))


class SiTBlock(nn.Module):
    """Attention and perceptron, each between an adaptive layer norm and a gate that starts closed (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, mlp: str = "gelu") -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        if mlp == "swiglu":  # two thirds as wide, so that its three matrices hold what two did (Shazeer 2020)
            self.mlp: nn.Module = SwiGLU(hidden_size, int(hidden_size * mlp_ratio * 2 / 3))
        else:
            self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens [B, T, D] to patches [B, T, p * p * C_out]."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The velocity of the flow: (x_t [B, C, h, w], t [B], label y [B]) -> [B, C, h, w].

    With `learn_sigma` the network has twice the output channels, as the published one, and the second half is dropped.
    With `pose_condition` it is also given the packed pose [B, 4, 4], whose embedding is added to those of t and y.
    `mlp`: gelu as published, or swiglu with as many weights.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1,
        learn_sigma: bool = False,
        pose_condition: bool = False,
        mlp: str = "gelu",
    ) -> None:
        super().__init__()
        self.patch_size, self.in_channels, self.learn_sigma = patch_size, in_channels, learn_sigma
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pose_embedder = PoseEmbedder(hidden_size) if pose_condition else None
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(position_embedding(hidden_size, grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads, mlp_ratio, mlp) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier for linear layers, small normals for embeddings, zeros where the network starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in (self.t_embedder, self.pose_embedder):
            for layer in embedder.mlp if embedder is not None else ():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        for block in [*self.blocks, self.final_layer]:
            nn.init.zeros_(block.adaLN_modulation[-1].weight)
            nn.init.zeros_(block.adaLN_modulation[-1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, drop_labels: Tensor | None = None, pose: Tensor | None = None
    ) -> Tensor:
        """Velocity at `x` [B, C, h, w], times `t` [B], labels `y` [B]; labels are ignored where `drop_labels` [B].

        `pose`: packed poses [B, 4, 4], for a model with `pose_condition`.
        """
        assert (pose is None) == (self.pose_embedder is None), "a pose is given to models with pose_condition"
        height, width = x.shape[-2:]
        tokens = self.x_embedder(x) + self.pos_embed  # [B, T, D]
        condition = self.t_embedder(t) + self.y_embedder(y, drop_labels)  # [B, D]
        if self.pose_embedder is not None:
            condition = condition + self.pose_embedder(pose)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)  # [B, T, p * p * C_out]
        out = self._unpatchify(patches, height // self.patch_size, width // self.patch_size)
        return out[:, : self.in_channels]

    def _unpatchify(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        p = self.patch_size
        grid = patches.reshape(-1, rows, columns, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows * p, columns * p)


def position_embedding(hidden_size: int, grid: int) -> Tensor:
    """Fixed sines and cosines of the column, then of the row, [grid * grid, hidden_size], computed in float64."""
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    waves = []
    for coordinate in (column, row):
        angles = coordinate.reshape(-1, 1).to(torch.float64) * omega
        waves += [angles.sin(), angles.cos()]
    return torch.cat(waves, dim=1).to(torch.float32)
