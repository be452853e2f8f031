#!/usr/bin/env bash
# size.sh: files and lines of each folder, and what is over a bound: 1,000 lines a file, 80 a function
# (kernels for GPUs apart, which are one function each).
set -euo pipefail
cd "$(dirname "$0")/.."
printf '%-26s %6s %8s\n' folder files lines
for folder in include src src/* src/backend/*/ src/backend/cpu/isa src/backend/cuda/kernels cli serve tests tests/fuzz tools examples; do
    folder=${folder%/}
    [ -d "$folder" ] || continue
    mapfile -t files < <(find "$folder" -maxdepth 1 -name '*.[ch]' -o -maxdepth 1 -name '*.cu' -o -maxdepth 1 -name '*.cuh' -o -maxdepth 1 -name '*.def' -o -maxdepth 1 -name '*.sh')
    [ ${#files[@]} = 0 ] && continue
    printf '%-26s %6d %8d\n' "$folder" ${#files[@]} "$(cat "${files[@]}" | wc -l)"
done
over=$(find include src cli tests \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' \) -exec awk 'END { if (NR > 1000) print FILENAME ": " NR " lines" }' {} \;)
long=$(find src cli tests -name '*.[ch]' -exec awk '
    /^\{$/ { start = FNR }
    /^\}/ && start { if (FNR - start - 1 > 80) print FILENAME ":" start ": " FNR - start - 1 " lines"; start = 0 }' {} \;)
[ -z "$over$long" ] && exit 0
printf '%s\n' "files over 1,000 lines, functions over 80:" "$over" "$long"
exit 1
