#!/usr/bin/env bash
# Table 1: the bottleneck loses structure, and staged token compression gives it back.
. "$(dirname "$0")/rows.sh"
row p64 --patch_size=64 --stc_depth=0 --global_crop_size=256 --local_crop_size=128
row p32 --patch_size=32 --stc_depth=0
row p16 --patch_size=16 --stc_depth=0
row p8 --patch_size=8 --stc_depth=0
row p8-stc --patch_size=8 --stc_depth=6
table 1
