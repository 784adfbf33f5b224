#!/usr/bin/env bash
# Table 11: latents of 8 × 8 × 32, the shape of DC-AE's, with decoder B for the 164 GFLOPs. The paper does not say
# whether its decoder was finetuned, nor for how long the generator was trained: here as in the ablations.
. "$(dirname "$0")/rows.sh"
row c32-stc --patch_size=8 --stc_depth=6 --latent_channels=32 --decoder=B
table 11
