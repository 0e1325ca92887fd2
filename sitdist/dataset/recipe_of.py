"""What a dataset's manifest says about its recipe."""

from __future__ import annotations

from typing import Any

from sitdist.dataset.manifest import DatasetManifest


def train_sources(manifest: DatasetManifest) -> list[dict[str, Any]]:
    """The sources of the training split, as the recipe has them."""
    given = manifest.recipe["splits"]["train"]
    return given if isinstance(given, list) else [given]
