#!/usr/bin/env bash
# The tokenizer on built-in shapes, from a bare checkout. Called again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/setup.sh
.venv/bin/python train_tokenizer.py config/shapes_tokenizer.py --resume=True "$@"
