#!/usr/bin/env bash
# The table of training speed on one GPU, an H100 or any other: not yet measured.
# usage: launch/bench_h100.sh > table.txt
set -euo pipefail
bench() { "${PYTHON:-python}" -m benchmarks train "$@"; echo; }

bench --model SiT-S/2 --latent 32 --batch 256 --backends fp32 bf16 bf16-blocks bf16-full bf16-graphs --pairs 5 --steps 20
bench --model SiT-B/2 --latent 32 --batch 256 --backends fp32 bf16 bf16-blocks bf16-full --pairs 5 --steps 10
bench --model SiT-L/2 --latent 32 --batch 128 --backends bf16 bf16-blocks bf16-full --pairs 5 --steps 10
bench --model SiT-XL/2 --latent 32 --batch 128 --backends bf16 bf16-blocks bf16-full --pairs 5 --steps 10
# The source's own experiment, with its autoencoder inside the step: SiT-B/8, 128 pixels, batch 150.
bench --model SiT-B/8 --latent 16 --batch 150 --baseline vae --backends fp32 bf16 bf16-blocks bf16-full bf16-graphs --pairs 5 --steps 5
