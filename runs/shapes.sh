#!/usr/bin/env bash
# The tokenizer on built-in shapes, and before it the network of its perceptual loss, from a bare checkout. Called again,
# it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/setup.sh
test -f out/shapes_vgg.pt2 || .venv/bin/python runs/features.py config/shapes_vgg.py
.venv/bin/python train_tokenizer.py config/shapes_tokenizer.py --resume=True "$@"
