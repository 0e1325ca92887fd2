"""How much memory a run needs on each device, and its checkpoints on disk, counted from the sizes before it starts.

What is counted: weights, gradients, the optimizer's state and averages in float32, and the activations that the
backward pass needs. What is not: the codec, workspaces, what the allocator cannot use (leave a fifth).
"""

from __future__ import annotations

import torch

from sitdist.config.experiment import SIT_SIZES, Config
from sitdist.io.memory import require_memory
from sitdist.model.sit import SiT

ACTIVATION_BYTES = 34  # a token, channel and block in 16 bits (Korthikanti et al. 2022, eq. 2, without the scores)
KEPT = {"off": 1.0, "selective": 0.7, "all": 0.06}  # of the activations; roughly
FLOAT = 4  # bytes
TABLE_WORLDS = (1, 8, 64)
TABLE_BATCH, TABLE_LATENT = 32, 32  # samples a device; latents of 4x32x32, which are 256 px with an SD-sized codec


def parameters(model: SiT) -> int:
    """Numbers in the weights."""
    return sum(each.numel() for each in model.parameters())


def state_bytes(model: SiT, backend: str, world: int, optimizer: int = 2, averages: int = 1) -> int:
    """Bytes on each of `world` devices of weights, gradients, optimizer and averages.

    `optimizer`: numbers of state a weight (AdamW: 2). `averages`: how many, the EMA among them.
    """
    count = parameters(model)
    share = count / world
    if backend == "fsdp2":
        largest = max(sum(each.numel() for each in block.parameters()) for block in model.blocks)
        gathered = 3 * largest if world > 1 else 0  # two blocks' weights (one ahead), one's gradients
        return int(FLOAT * ((2 + optimizer + averages) * share + gathered))
    if backend.startswith("zero") and world > 1:
        gradients = share if backend == "zero2" else count
        return int(FLOAT * ((1 + averages) * count + gradients + (1 + optimizer) * share))
    return FLOAT * (2 + optimizer + averages) * count


def activation_bytes(model: SiT, samples: int, fp32: bool, kept: str = "off") -> int:
    """Bytes of what `samples` samples keep for the backward pass, with activation checkpointing `kept`; roughly."""
    tokens, width = model.pos_embed.shape[1:]
    return int(samples * tokens * width * len(model.blocks) * ACTIVATION_BYTES * (2 if fp32 else 1) * KEPT[kept])


def memory_estimate(config: Config, model: SiT, micro: int, backend: str = "ddp", world: int = 1) -> int:
    """Bytes on each device of a run with `micro` samples at a time; a rough number."""
    train = config.train
    state = state_bytes(model, backend, world, optimizer_numbers(config), 1 + more_averages(config))
    return state + activation_bytes(model, micro, train.precision == "fp32", train.activation_checkpointing)


def check_memory(config: Config, model: SiT, micro: int, backend: str, world: int) -> None:
    """OutOfMemoryError where a run on CPUs cannot have room beside its weights, which are there; a cautious bound."""
    kept = activation_bytes(model, micro, config.train.precision == "fp32", config.train.activation_checkpointing)
    state = state_bytes(model, backend, world, optimizer_numbers(config), 1 + more_averages(config))
    require_memory(
        max(0, state - FLOAT * parameters(model)) + kept // 2,
        f"training {parameters(model) / 1e6:,.1f} M weights with {micro} samples at a time",
        "set train.max_batch_per_device lower, train.activation_checkpointing: all, or take a smaller model",
    )


def checkpoint_bytes(config: Config, model: SiT) -> int:
    """Of one checkpoint: weights, their average, the optimizer's state, and further averages."""
    return FLOAT * parameters(model) * (2 + optimizer_numbers(config) + more_averages(config))


def optimizer_numbers(config: Config) -> int:
    """Numbers of state that the optimizer keeps for each weight."""
    optimizer = config.train.optimizer
    return 2 if optimizer.kind == "adamw" else int(optimizer.momentum > 0)


def more_averages(config: Config) -> int:
    """How many averages the run keeps beside the EMA."""
    averages = config.train.averages
    return 0 if averages is None else len(averages.decays) + len(averages.sigma_rels)


def memory_table() -> str:
    """GB a device by model, backend and number of devices, as in launch/README.md (Markdown)."""
    heads = [f"{backend}, {world}" for backend in ("ddp", "zero1", "zero2", "fsdp2") for world in TABLE_WORLDS[1:]]
    rows = ["| model | parameters | one device | " + " | ".join(heads) + " | activations |"]
    rows.append("|" + "---|" * (len(heads) + 4))
    for size, (depth, width, num_heads) in SIT_SIZES.items():
        with torch.device("meta"):
            model = SiT(TABLE_LATENT, 2, 4, width, depth, num_heads)
        cells = [state_bytes(model, head.split(", ")[0], int(head.split(", ")[1])) for head in heads]
        cells = [state_bytes(model, "ddp", 1), *cells, activation_bytes(model, TABLE_BATCH, fp32=False)]
        told = " | ".join(f"{cell / 1e9:.2f}" for cell in cells)
        rows.append(f"| SiT-{size}/2 | {parameters(model) / 1e6:.0f} M | {told} |")
    return "\n".join(rows)
