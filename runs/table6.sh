#!/usr/bin/env bash
# Table 6: where the compression layer stands (M = 0 is p = 16, M = 12 is p = 8 without it); which self-supervision.
. "$(dirname "$0")/rows.sh"
row p16 --patch_size=16 --stc_depth=0
row p8-m3 --patch_size=8 --stc_depth=3
row p8-stc --patch_size=8 --stc_depth=6
row p8-m9 --patch_size=8 --stc_depth=9
row p8 --patch_size=8 --stc_depth=0
row p16-dino --patch_size=16 --stc_depth=0 --ssl_method=dino
row p16-dinov2 --patch_size=16 --stc_depth=0 --ssl_method=dinov2 --global_crop_scale=0.32,1 --local_crops=8 \
    --local_crop_scale=0.05,0.32 # DINOv2's crops
table 6
