#!/usr/bin/env bash
# 1.1 B parameters (TinyLlama-1.1B, 2048 tokens) to 32,768 on one card of 16 GB: adapters, embeddings and norms, whole sequences.
# Expected: 12 GiB on the card; 131 M tokens, 14 hours at 40 TFLOP/s (6 with --train-window 2048). Not run so far.
# bash recipes/1b-16gb.sh MODEL OUT.gguf TEXTS [OPTION...]
set -euo pipefail
exec pi-gguf convert "${1:?MODEL}" "${2:?OUT.gguf}" --data "${3:?TEXTS}" --context 32768 --quant Q4_K_M --device cuda \
    --train lora --train-window 32768 "${@:4}"
