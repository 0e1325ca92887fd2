"""What a finished dataset holds, read from its manifest alone and without importing torch."""

from __future__ import annotations

from pathlib import Path

from sitdist.dataset.manifest import load_manifest
from sitdist.dataset.store import open_store


def info(dataset: str | Path) -> str:
    """A few lines that say what a dataset holds, given as a folder or an fsspec URL."""
    manifest = load_manifest(open_store(dataset).folder)
    latent, psnr = manifest.latent, manifest.codec_psnr
    lines = [
        f"{manifest.name}: {manifest.image_size}x{manifest.image_size} pixels, latents "
        f"{latent.channels}x{latent.height}x{latent.width}, codec {manifest.codec['kind']}"
        + (f" (round trip {psnr.mean:.2f} dB on {psnr.n} views of {psnr.split})" if psnr else "")
    ]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        low, high = split.radius
        augmented = f" ({split.radius_augmented} of them radius augmented)" if split.radius_augmented else ""
        lines.append(
            f"  {name}: {split.count} views{augmented}, radius {low:.2f} to {high:.2f}, {len(split.shards)} shards, "
            f"{size:.1f} MB"
        )
    return "\n".join(lines)
