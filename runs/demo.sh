#!/usr/bin/env bash
# All stages on the built-in shapes, on a laptop: environment, tokenizer, generator, samples. Goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/setup.sh
.venv/bin/python train_tokenizer.py config/shapes_tokenizer.py --resume=True
.venv/bin/python train_dit.py config/shapes_dit.py --resume=True
.venv/bin/python sample.py --checkpoint=out/shapes_dit/checkpoint.pt --out_dir=out/shapes_samples --cfg_scale=2
echo "pictures: out/shapes_tokenizer/reconstructions.png, out/shapes_samples/samples.png"
