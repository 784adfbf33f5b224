#!/usr/bin/env bash
# Table 3: patch sizes, with and without self-supervision.
. "$(dirname "$0")/rows.sh"
row p64-none --patch_size=64 --stc_depth=0 --global_crop_size=256 --local_crop_size=128 --ssl_method=none
row p64 --patch_size=64 --stc_depth=0 --global_crop_size=256 --local_crop_size=128
row p32-none --patch_size=32 --stc_depth=0 --ssl_method=none
row p32 --patch_size=32 --stc_depth=0
row p16-none --patch_size=16 --stc_depth=0 --ssl_method=none
row p16 --patch_size=16 --stc_depth=0
row p8-none --patch_size=8 --stc_depth=0 --ssl_method=none
row p8 --patch_size=8 --stc_depth=0
table 3
