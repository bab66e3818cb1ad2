#!/usr/bin/env bash
# The paper's tables and figure 2 for the bundled model, from 2048 to 32,768 tokens: report.html beside this file.
# 12 minutes of training and validating and 7 of measuring on 2 cores; OUT is a folder to work in.
set -euo pipefail
OUT=${1:?"usage: recipes/report/run.sh OUT"}
mkdir -p "$OUT"
cd "$OUT"
pi-gguf extend bundled:tiny tiny-32k-hf --context 32768 --steps 690 --train-window 512x600,2048+512+8192 \
  --batch-tokens 4096 --factor-warmup 350 --schedule decay --eval-steps 230
for quant in F16 Q8_0 Q4_K_M; do
  pi-gguf convert tiny-32k-hf "tiny-32k-$quant.gguf" --quant "$quant" --no-certify
done
pi-gguf eval report bundled:tiny tiny-32k-hf tiny-32k-F16.gguf tiny-32k-Q8_0.gguf tiny-32k-Q4_K_M.gguf \
  --out report --samples 1 --limit 100
