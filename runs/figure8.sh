#!/usr/bin/env bash
# Figure 8: decoders of three sizes at four patch sizes.
. "$(dirname "$0")/rows.sh"
for decoder in S B L; do
    row p64-$decoder --patch_size=64 --stc_depth=0 --global_crop_size=256 --local_crop_size=128 --decoder=$decoder
    row p32-$decoder --patch_size=32 --stc_depth=0 --decoder=$decoder
    row p16-$decoder --patch_size=16 --stc_depth=0 --decoder=$decoder
    row p8-$decoder --patch_size=8 --stc_depth=0 --decoder=$decoder
done
table figure8
