#!/usr/bin/env bash
# Table 10: 128 and 256 latent channels. (In the paper the third row of 128 repeats the numbers of the second of 256, a
# misprint: beside ours stand Table 2's.)
. "$(dirname "$0")/rows.sh"
row p8-none --patch_size=8 --stc_depth=0 --ssl_method=none
row p8-stc-none --patch_size=8 --stc_depth=6 --ssl_method=none
row p8-stc --patch_size=8 --stc_depth=6
row c256-none --patch_size=8 --stc_depth=0 --latent_channels=256 --ssl_method=none
row c256-stc-none --patch_size=8 --stc_depth=6 --latent_channels=256 --ssl_method=none
row c256-stc --patch_size=8 --stc_depth=6 --latent_channels=256
table 10
