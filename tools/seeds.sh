#!/usr/bin/env bash
# seeds.sh: the command lines of three lessons (tests/commands, byte for byte) on a model of SD 1.5's
# shapes: first the plan of the whole line, then a short run and what it leaves.
#
#   tools/seeds.sh SD15_FOLDER PICTURES_FOLDER [PROGRAM]
#
# SD15_FOLDER is made by tools/make_sd15.py where no real one is at hand; PICTURES_FOLDER holds
# pictures with .txt captions. Needs about 6 GiB of memory and a few minutes. Fails where a count
# is not the lesson's.
set -euo pipefail
model=$(realpath "$1") pictures=$(realpath "$2") program=$(realpath "${3:-build/release/velatura}")
commands=$(realpath "$(dirname "$0")/../tests/commands")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export VELATURA_MODEL_ROOT=$work/models
mkdir -p models/runwayml models/banana-ai train_data/10_sks_style aawxbc dataset/my_sketch_style
ln -s "$model" models/runwayml/stable-diffusion-v1-5
ln -s "$model" models/banana-ai/nano-banana-v1-base
ln -s "$program" accelerate
for folder in train_data/10_sks_style aawxbc dataset/my_sketch_style; do
    find "$pictures" -maxdepth 1 -name '*.png' | sort | head -n 3 | while read -r picture; do
        cp "$picture" "${picture%.png}.txt" $folder/
    done
done
rm -f aawxbc/*.txt

line() { # NAME FLAGS: a lesson's line with flags behind it
    local name=$1
    shift
    more=("$@")
    accelerate() { ./accelerate "$@" "${more[@]}"; }
    # shellcheck disable=SC1090
    . "$commands/$name.sh"
}

expect() { # FILE TENSORS
    local n text
    text=$("$program" inspect "$1")
    head -n 6 <<<"$text"
    n=$(head -c 1000000 "$1" | grep -aoE '"[^"]+": *\{"dtype"' | wc -l)
    echo "$n tensors, $(stat -c %s "$1") bytes"
    [ "$n" = "$2" ] || {
        echo "$1: not $2 tensors"
        exit 1
    }
}

for name in s0 s1 s3; do
    printf '\n== %s, the whole line: its plan\n' $name
    line $name --dry_run 2>/dev/null | sed -n '/^trainable/,$p'
done

printf '\n== s1, one step at 64 pixels\n'
line s1 --resolution=64 --epochs 0 --steps 1 >/dev/null 2>&1
expect output/my_style_lora.safetensors 792
# Class pictures are drawn at the model's own 512 pixels, which takes a CPU long: here they are
# given; tests/test_seeds.c has them drawn by a small model.
printf '\n== s3, one step at 64 pixels, with class pictures in place\n'
cp -r aawxbc figurine
line s3 --resolution=64 --num_class_images=3 --max_train_steps=1 >/dev/null 2>&1
expect dreambooth-lora/pytorch_lora_weights.safetensors 256
printf '\n== s0, one step at 64 pixels\n'
line s0 --resolution=64 --max_train_steps=1 --gradient_accumulation_steps=1 >/dev/null 2>&1
expect output/sketch-lora/pytorch_lora_weights.safetensors 256
"$program" generate 'A futuristic car drifting on a highway' --model banana-ai/nano-banana-v1-base \
    --lora output/sketch-lora:0.8 --steps 2 --width 64 --height 64 --output car.png 2>/dev/null
ls car.png
echo "all counts are the lessons'"
