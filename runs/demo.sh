#!/usr/bin/env bash
# All stages on the built-in shapes, from a bare checkout: minutes on two CPU cores, no download but the packages. Called
# again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/shapes.sh                                                                  # stage 1: perceptual loss, tokenizer
.venv/bin/python train_dit.py config/shapes_dit.py --resume=True                # stage 2: the generator
.venv/bin/python sample.py --checkpoint=out/shapes_dit/checkpoint.pt --cfg_scale=2.5    # stage 3: a picture
.venv/bin/python eval.py --tokenizer=out/shapes_tokenizer/checkpoint.pt --feature_net=none --lpips_net=none --pca=True --workers=2  # stage 4
echo
echo "originals over reconstructions:  out/shapes_tokenizer/reconstructions.png"
echo "samples of ten classes:          out/samples/samples.png"
