#!/usr/bin/env bash
# Eight cards of 80 GB in one machine, sharded by FSDP2: 13 B parameters, every weight, whole sequences of 32,768.
# Expected: 56 GiB a card; 131 M tokens, an hour and a half at 400 TFLOP/s a card. 65 B parameters do not fit so (122 GiB a card before
# activations): give --train qlora --train-window 2048, 42 GiB a card, copied to each. Not run so far.
# bash recipes/8-gpus.sh MODEL OUT_DIR TEXTS [OPTION...]; then: pi-gguf convert OUT_DIR OUT.gguf --quant Q4_K_M
set -euo pipefail
exec torchrun --nproc-per-node "${GPUS:-8}" -m pi_gguf extend "${1:?MODEL}" "${2:?OUT_DIR}" --data "${3:?TEXTS}" \
    --context 32768 --device cuda --train-window 32768 --batch-tokens 262144 --steps 500 "${@:4}"
