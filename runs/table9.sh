#!/usr/bin/env bash
# Table 9: the weight of the reconstruction, at p = 16.
. "$(dirname "$0")/rows.sh"
row p16 --patch_size=16 --stc_depth=0
row p16-alpha1 --patch_size=16 --stc_depth=0 --alpha=1.0
row p16-alpha10 --patch_size=16 --stc_depth=0 --alpha=10.0
table 9
