#!/usr/bin/env bash
# Two machines of eight cards of 80 GB: 13 B parameters, every weight, whole sequences of 32,768. The same command on both, with the
# first one's name; model, texts and OUT_DIR on a disk that both see. Expected (pi-gguf plan --on 2x8xH100-80GB): 48 GiB a card;
# 131 M tokens, 54 minutes, and as much again where the network is slow. Not run so far.
# FIRST=name bash recipes/two-machines.sh MODEL OUT_DIR TEXTS [OPTION...]; then: pi-gguf convert OUT_DIR OUT.gguf --quant Q4_K_M
set -euo pipefail
exec torchrun --nnodes 2 --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d --rdzv-endpoint "${FIRST:?name of the first machine}:29500" \
    -m pi_gguf extend "${1:?MODEL}" "${2:?OUT_DIR}" --data "${3:?TEXTS}" \
    --context 32768 --device cuda --train-window 32768 --batch-tokens 524288 --steps 250 "${@:4}"
