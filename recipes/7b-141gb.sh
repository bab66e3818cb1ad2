#!/usr/bin/env bash
# 7 B parameters (LLaMA 7B, 2048 tokens) to 32,768 on one card of 141 GB, every weight, whole sequences: the paper's own run.
# Expected: 122 GiB on the card; 131 M tokens, 6 hours at 400 TFLOP/s. Not run so far.
# bash recipes/7b-141gb.sh MODEL OUT.gguf TEXTS [OPTION...]
set -euo pipefail
exec pi-gguf convert "${1:?MODEL}" "${2:?OUT.gguf}" --data "${3:?TEXTS}" --context 32768 --quant Q4_K_M --device cuda \
    --train full --train-window 32768 "${@:4}"
