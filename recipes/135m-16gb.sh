#!/usr/bin/env bash
# 135 M parameters (SmolLM-135M, 2048 tokens) to 32,768 on one card of 16 GB, every weight, a fifth of the tokens in whole sequences.
# Expected: 5 GiB on the card; 131 M tokens, an hour and a half at 40 TFLOP/s. Not run so far.
# bash recipes/135m-16gb.sh MODEL OUT.gguf TEXTS [OPTION...]
set -euo pipefail
exec pi-gguf convert "${1:?MODEL}" "${2:?OUT.gguf}" --data "${3:?TEXTS}" --context 32768 --quant Q8_0 --device cuda \
    --train full --learning-rate 2e-4 --mix 0.2 "${@:4}"
