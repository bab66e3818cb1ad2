#!/usr/bin/env bash
# 8 B parameters (Llama 3 8B, 8192 tokens) to 32,768 on one card of 24 GB: adapters on weights in 4 bits, whole sequences whose inputs
# of layers wait in the host's memory (17 GiB there). Needs bitsandbytes. 18.5 GB on the card (measured with random weights on an H200,
# recipes/gpu: 9.6 s a sequence, so 33 M tokens in 2.7 hours there); about 15 with --train-window 8192.
# Not run so far.
# bash recipes/8b-24gb.sh MODEL OUT.gguf TEXTS [OPTION...]
set -euo pipefail
exec pi-gguf convert "${1:?MODEL}" "${2:?OUT.gguf}" --data "${3:?TEXTS}" --context 32768 --quant Q4_K_M --device cuda \
    --train qlora --train-window 32768 --steps 500 --batch-tokens 65536 "${@:4}"
