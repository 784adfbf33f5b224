#!/usr/bin/env bash
# Table 4, the system-level row: the joint tokenizer with decoder B, its decoder finetuned against DINO, and the
# generator for 800 epochs. runs/imagenet256.sh is this after runs/setup.sh.
. "$(dirname "$0")/rows.sh"
tokenizer system --patch_size=8 --stc_depth=6 --decoder=B
finetune system
DECODER=$OUT/system/finetuned/checkpoint.pt generator system "${LONG[@]}"
table 4
