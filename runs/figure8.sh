#!/usr/bin/env bash
# Figure 8: decoders S, B and L at four patch sizes; with S they are rows of other tables. p = 8 is with staged
# compression: the paper says that generation gets better with every step, and without it p = 8 is worse than p = 16.
. "$(dirname "$0")/rows.sh"
row p64 --patch_size=64 --stc_depth=0 --global_crop_size=256 --local_crop_size=128
row p32 --patch_size=32 --stc_depth=0
row p16 --patch_size=16 --stc_depth=0
row p8-stc --patch_size=8 --stc_depth=6
for decoder in B L; do
    row p64-$decoder --patch_size=64 --stc_depth=0 --global_crop_size=256 --local_crop_size=128 --decoder=$decoder
    row p32-$decoder --patch_size=32 --stc_depth=0 --decoder=$decoder
    row p16-$decoder --patch_size=16 --stc_depth=0 --decoder=$decoder
    row p8-stc-$decoder --patch_size=8 --stc_depth=6 --decoder=$decoder
done
table figure8
