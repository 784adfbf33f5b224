#!/usr/bin/env bash
# Table 8: the compression layer, without self-supervision.
. "$(dirname "$0")/rows.sh"
row p8-stc-none-shuffle --patch_size=8 --stc_depth=6 --ssl_method=none --compression=shuffle
row p8-stc-none --patch_size=8 --stc_depth=6 --ssl_method=none
table 8
