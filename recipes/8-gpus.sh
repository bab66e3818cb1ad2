#!/usr/bin/env bash
# Eight cards of 80 GB in one machine, sharded by FSDP2: 13 B parameters, every weight, whole sequences of 32,768.
# Expected on H100 (pi-gguf plan --on 8xH100-80GB): 57 GiB a card, 388 GiB of the host while it opens; 131 M tokens, 1.8 hours. 65 B
# parameters do not fit so (plan says what would do): --train qlora --train-window 2048 takes 58 GiB a card, copied to each. Not run so far.
# bash recipes/8-gpus.sh MODEL OUT_DIR TEXTS [OPTION...]; then: pi-gguf convert OUT_DIR OUT.gguf --quant Q4_K_M
set -euo pipefail
exec torchrun --nproc-per-node "${GPUS:-8}" -m pi_gguf extend "${1:?MODEL}" "${2:?OUT_DIR}" --data "${3:?TEXTS}" \
    --context 32768 --device cuda --train-window 32768 --batch-tokens 262144 --steps 500 "${@:4}"
