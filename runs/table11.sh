#!/usr/bin/env bash
# Table 11: latents of 8 × 8 × 32, the shape of DC-AE's.
. "$(dirname "$0")/rows.sh"
row c32-stc --patch_size=8 --stc_depth=6 --latent_channels=32 --decoder=B
table 11
