#!/usr/bin/env bash
# The longer run of the demo: more steps, two held-out novels, a finer grid of passkeys.
# About an hour on 2 cores (--device cuda was not run so far).
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/pi-gguf demo --out out/tiny-32k --steps 1100 --train-window 512x800,8192+512+2048+16384+512+2048 \
    --factor-warmup 400 --batch-tokens 8192 --documents 2 --distances 4 --keys 3 "$@"
cp out/tiny-32k/{results.json,table.md,perplexity.png,passkey.png} recipes/tiny-32k/
.venv/bin/python tools/write_tables.py
