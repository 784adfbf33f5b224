#!/usr/bin/env bash
# Table 2: staged token compression, with and without self-supervision.
. "$(dirname "$0")/rows.sh"
row p8-none --patch_size=8 --stc_depth=0 --ssl_method=none
row p8-stc-none --patch_size=8 --stc_depth=6 --ssl_method=none
row p8 --patch_size=8 --stc_depth=0
row p8-stc --patch_size=8 --stc_depth=6
table 2
