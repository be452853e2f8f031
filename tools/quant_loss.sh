#!/usr/bin/env bash
# quant_loss.sh: the loss of a LoRA on a frozen base in 4 or 8 bits beside that on bfloat16, for each
# larger family's small model of tests/golden/families: 60 steps, the same pictures, noise and first
# values. Prints for each kind the mean loss, how far it is from bfloat16's, and how far the curve is
# at most: the losses of 20 steps together, which is what a person sees of it. Ends with an error when
# one is 2 % away or more. usage: tools/quant_loss.sh [VELATURA] [DEVICE]
set -euo pipefail
program=${1:-build/release/velatura} device=${2:-cpu}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/pictures"
cp examples/flat-style/image_0[1-4].* "$folder/pictures"
echo "$("$program" --version | head -1), device $device"
printf '%-10s %-11s %10s %9s %9s\n' family base 'mean loss' 'mean' 'curve'
worst=0
for family in sdxl sd3 flux-dev sana lumina2; do
    for kind in none int8 fp8 nf4 nf4_double; do
        "$program" train --model tests/golden/families/$family/model --data "$folder/pictures" \
            --resolution 64 --steps 60 --rank 4 --learning_rate 1e-3 --precision bf16 --seed 1 \
            --device "$device" --base_quant $kind --save_every 0 --overwrite \
            --output_dir "$folder/$kind" --output_name a --quiet >/dev/null 2>"$folder/errors" ||
            { cat "$folder/errors"; exit 1; }
        sed -n 's/.*"loss": *\([0-9.e+-]*\).*/\1/p' "$folder/$kind/a.log.jsonl" >"$folder/$kind.txt"
        paste "$folder/none.txt" "$folder/$kind.txt" | awk -v name="$family" -v kind=$kind '
            function off(a, b) { return a > b ? a / b - 1 : b / a - 1 }
            { plain += $1; coded += $2; p += $1; c += $2 }
            NR % 20 == 0 { d = off(p, c); if (d > most) most = d; p = c = 0 }
            END {
                printf "%-10s %-11s %10.4f %8.2f%% %8.2f%%\n", name, kind, coded / NR,
                    100 * (coded / plain - 1), 100 * most
                exit NR != 60 || most >= 0.02 || off(plain, coded) >= 0.02
            }' || worst=1
    done
done
[ $worst = 0 ] && echo "all within 2 %" || { echo "not all within 2 %"; exit 1; }
