# Sourced by the table scripts. Each calls `row` once for every row of its table, and then `table`.
#
#   DATA=imagenet GPUS=8 runs/table2.sh      # DATA holds train/, val/ and ADM's VIRTUAL_imagenet256_labeled.npz
#   SCALE=shapes runs/table2.sh              # the same rows in tiny, on built-in shapes: what runs, not what comes out
#   ACCUMULATE=2 DATA=imagenet runs/table2.sh # a tokenizer's steps in two parts, for less memory (DINOv2's KoLeo sees half)
#   PYTHON=echo DATA=imagenet runs/table2.sh # runs nothing and shows the commands
#
# All need the environment that runs/setup.sh makes, or PYTHON=, another Python with the same packages.
# Rows that tables share are run once; a second call does only what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SCALE=${SCALE:-imagenet}
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-out/tables-$SCALE}
CFG=${CFG:-1.5} # guidance of the columns "with guidance"; the paper does not say its scale
if [ "$SCALE" = shapes ]; then
    GPUS=${GPUS:-1} SAMPLES=20
    TOKENIZER=(config/toy_tokenizer.py)
    DIT=(config/toy_dit.py) LONG=(--epochs=2 --decay_epoch=1)
    FINETUNE=(config/cifar10_finetune.py --batch_size=16 --discriminator_size=16/4/2 --discriminator_input=16)
    REFERENCE=shapes
else
    GPUS=${GPUS:-8} SAMPLES=50000
    TOKENIZER=(--data_dir="${DATA:?the folder with train/ and val/: DATA=imagenet $0}")
    DIT=() LONG=(--epochs=800 --decay_epoch=40)
    FINETUNE=(config/finetune_decoder.py)
    REFERENCE=$DATA/VIRTUAL_imagenet256_labeled.npz
    if [ "$PYTHON" != echo ] && [ ! -f "$REFERENCE" ]; then # gFID is measured last, days from here
        echo "$REFERENCE is missing: it is at github.com/openai/guided-diffusion, evaluations/" >&2
        exit 1
    fi
fi

launch() { # a script with its constants, on all GPUs
    if [ "$GPUS" -gt 1 ]; then
        "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$@"
    else
        "$PYTHON" "$@"
    fi
}

toy() { # a row's constants at the toy's scale: 32 px for 256, 4 blocks for 12, 8 channels for 128
    for constant in "$@"; do
        local value=${constant#*=}
        case $constant in
            --patch_size=*) echo "--patch_size=$((value / 4))" ;;
            --stc_depth=*) echo "--stc_depth=$((value / 3))" ;;
            --latent_channels=*) echo "--latent_channels=$((value / 16))" ;;
            --decoder=B) echo "--decoder=96/4/4" ;;
            --decoder=L) echo "--decoder=128/8/4" ;;
            --*_crop_size=* | --local_crops=*) ;;
            *) echo "$constant" ;;
        esac
    done
}

tokenizer() { # name, constants of train_tokenizer.py: trains and measures a tokenizer
    local out=$OUT/$1 constants=("${@:2}")
    if [ "$SCALE" = shapes ]; then
        constants=()
        while read -r constant; do constants+=("$constant"); done < <(toy "${@:2}")
    fi
    launch train_tokenizer.py "${TOKENIZER[@]}" "${constants[@]}" --accumulate="${ACCUMULATE:-1}" \
        --out_dir="$out/tokenizer" --resume=True
    [ "$SCALE" = shapes ] && feature_net "$out/tokenizer/checkpoint.pt"
    [ -f "$out/tokenizer.json" ] || launch eval.py --tokenizer="$out/tokenizer/checkpoint.pt" \
        --out="$out/tokenizer.json" ${NET[@]+"${NET[@]}"}
}

finetune() { # name of a row whose tokenizer is there: finetunes its decoder, and measures that
    local out=$OUT/$1
    launch train_tokenizer.py "${FINETUNE[@]}" --init_from="$out/tokenizer/checkpoint.pt" --out_dir="$out/finetuned" \
        --resume=True
    [ -f "$out/finetuned.json" ] || launch eval.py --tokenizer="$out/finetuned/checkpoint.pt" \
        --out="$out/finetuned.json" ${NET[@]+"${NET[@]}"}
}

generator() { # name of a row whose tokenizer is there, constants of train_dit.py: trains and measures a generator
    local out=$OUT/$1
    launch train_dit.py ${DIT[@]+"${DIT[@]}"} "${@:2}" --tokenizer="$out/tokenizer/checkpoint.pt" --out_dir="$out/dit" \
        --resume=True
    [ "$PYTHON" = echo ] || finished "$out/dit/checkpoint.pt"
    for cfg in 1 "$CFG"; do
        [ -f "$out/samples-$cfg.json" ] && continue
        launch sample.py --checkpoint="$out/dit/checkpoint.pt" --tokenizer="${DECODER:-$out/tokenizer/checkpoint.pt}" \
            --num_samples=$SAMPLES --cfg_scale="$cfg" --out_dir="$out/samples-$cfg"
        launch eval.py --samples="$out/samples-$cfg/samples.npz" --reference="$REFERENCE" \
            --out="$out/samples-$cfg.json" ${NET[@]+"${NET[@]}"}
    done
}

finished() { # a checkpoint's run: train_dit.py exits 0 after SIGTERM too, and half a generator is not for a table
    "$PYTHON" - "$1" <<<'import sys, torch
path = sys.argv[1]
sys.exit(None if torch.load(path, weights_only=True, mmap=True)["finished"] else f"{path} is not finished: call again")'
}

row() {
    tokenizer "$@"
    generator "$1"
}

NET=()
feature_net() { # Inception means little for shapes of 32 px, and is a download: a small network of our own instead
    [ -f "$OUT/classifier.pt2" ] || "$PYTHON" runs/recognise.py --tokenizer="$1" --images=400 --epochs=1 \
        --feature_net="$OUT/classifier.pt2"
    NET=(--feature_net="$OUT/classifier.pt2" --lpips_net=none)
}

table() { "$PYTHON" runs/tables.py --table="$1" --out="$OUT" --cfg="$CFG"; }
