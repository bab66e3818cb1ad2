#!/usr/bin/env bash
# The bundled model (2.6 M parameters, 2048 tokens) to 32,768 on a CPU, every weight; sequences of 512 tokens with skips while the factor
# grows, then 512 to 16,384 in turn. Expected: 3 GiB, half an hour on 2 cores. What recipes/tiny-32k measures.
# bash recipes/tiny-cpu.sh OUT.gguf [OPTION...]
set -euo pipefail
exec pi-gguf convert bundled:tiny "${1:?OUT.gguf}" --context 32768 --quant Q8_0 --device cpu --steps 1100 \
    --train-window 512x800,8192+512+2048+16384+512+2048 --factor-warmup 400 --schedule decay "${@:2}"
