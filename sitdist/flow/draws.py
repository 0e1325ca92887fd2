"""Random numbers as a pure function of (seed, stream, position): stateless, and equal on any number of processes.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain int64 tensor operations.
The key comes from the seed and the stream's name, the counter from the global position of the sample and the number
within it. Integers are equal on every device; normals are computed in float64 and rounded to float32.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Ten rounds over four counter words; words are unsigned 32-bit integers held in int64. Returns [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two 32-bit words wraps in int64, which leaves its 64 bits right; shift, then mask the sign.
        low_product, high_product = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high_product >> 32) & _MASK) ^ c1 ^ k0,
            high_product & _MASK,
            ((low_product >> 32) & _MASK) ^ c3 ^ k1,
            low_product & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def _key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _words(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """[B, count] unsigned 32-bit words, those of sample `positions[b]` in row b."""
    positions = positions.to(torch.int64)[:, None]
    blocks = torch.arange((count + 3) // 4, device=positions.device)[None, :]
    zero = torch.zeros_like(blocks)
    words = philox((blocks, zero, positions & _MASK, (positions >> 32) & _MASK), _key(seed, stream))
    return words.reshape(positions.shape[0], -1)[:, :count]


def uniform(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1), float64 [B, count], for the samples at global `positions` [B]."""
    return (_words(seed, stream, positions, count).to(torch.float64) + 0.5) * 2.0**-32


def normal(seed: int, stream: str, positions: Tensor, count: int) -> Tensor:
    """Standard normal numbers, float32 [B, count], for the samples at global `positions` [B] (Box-Muller)."""
    pairs = uniform(seed, stream, positions, count + count % 2).reshape(positions.shape[0], -1, 2)
    radius, angle = (-2.0 * pairs[..., 0].log()).sqrt(), 2.0 * math.pi * pairs[..., 1]
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return both.reshape(positions.shape[0], -1)[:, :count].to(torch.float32)


def permutation(seed: int, stream: str, n: int, epoch: int) -> Tensor:
    """A uniformly random order of range(n), int64 [n], for this (seed, stream, epoch)."""
    words = _words(seed, f"{stream}/{epoch}", torch.arange(n), 2)
    return torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)
