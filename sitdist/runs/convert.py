"""Weights of a run, or of a published checkpoint, as one file that other code loads: a plain state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sitdist.errors import CheckpointError, ConfigError
from sitdist.io.atomic import check_free, write_atomically
from sitdist.model.pretrained import read_weights
from sitdist.runs.checkpoint import folder_of, no_checkpoint, read_checkpoint, read_newest

Weights = Literal["ema", "model"]
SUFFIXES = (".safetensors", ".pt")


def convert(source: Path, out: Path, step: int | None = None, weights: Weights = "ema") -> str:
    """Write the weights of `source` to `out`, as safetensors or, for a `.pt`, with torch.save; returns a summary line.

    source: a run (at `step`, by default its newest whole checkpoint; its EMA or its model), or a file that
    `model.init_from` takes. The tensors have the names of the published SiT code, which can load the file. ConfigError,
    CheckpointError; `out` is written whole or not at all.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out}: what is to be written shows in the name; end it with {' or '.join(SUFFIXES)}")
    check_free(out)
    if source.is_dir():
        tensors, where = _of_run(source, step, weights)
    elif source.is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: {source} is one file, which holds one step; leave it out")
        tensors, where = read_weights(source), str(source)
    else:
        raise CheckpointError(f"{source}: no such run or file; give the --out of `sitdist train`, or a file of weights")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    write_atomically(out, lambda path: (_save_pt if out.suffix == ".pt" else save_file)(plain, path))
    numbers = sum(tensor.numel() for tensor in plain.values())
    return f"{out}: {len(plain)} tensors, {numbers:,} numbers, of {where}"


def _save_pt(tensors: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:  # which is what torch says where the file raised another
            raise error.__context__ or error from None


def _of_run(run: Path, step: int | None, weights: Weights) -> tuple[dict[str, Tensor], str]:
    checkpoint = read_newest(run, [weights]) if step is None else read_checkpoint(folder_of(run, step), [weights])
    if checkpoint is None:
        raise no_checkpoint(run)
    return checkpoint.tensors[weights], f"{checkpoint.folder / weights}.safetensors"
