#!/usr/bin/env bash
# races.sh [PATTERN]: tests under ThreadSanitizer, with OpenMP's barriers known to it. gcc's OpenMP is
# compiled without them and every parallel loop would be reported; so the objects, made by gcc, are
# linked with clang's OpenMP and its tool for this, libarcher (Debian: clang-16 libomp-16-dev). What
# libvips, glib and oneDNN do among themselves is not looked at.
set -euo pipefail
cd "$(dirname "$0")/.."
pattern=${1:-train_*}
archer=$(find /usr/lib/llvm-* -name libarcher.so 2>/dev/null | sort -V | tail -n 1)
[ -n "$archer" ] || { echo "races.sh: no libarcher.so: install clang-16 and libomp-16-dev" >&2; exit 1; }
llvm=$(dirname "$(dirname "$archer")")
symbolizer=$(find /usr/lib/llvm-*/bin -name llvm-symbolizer | sort -V | tail -n 1)
objects=build/san-thread-hostile
make -s -j"$(nproc)" SAN=thread HOSTILE=1 $objects/run-tests
make -s -j"$(nproc)" build/release/velatura
"$llvm/bin/clang" -fsanitize=thread -fopenmp=libomp -o $objects/run-tests-races $objects/tests/*.o \
    $objects/libvelatura.a $(pkg-config --libs vips gio-2.0 jansson libpcre2-8 libutf8proc) \
    -ldnnl -llapack -lm -ldl -lpthread
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} OMP_TOOL_LIBRARIES=$archer
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 history_size=4 exitcode=66${symbolizer:+ external_symbolizer_path=$symbolizer}"
$objects/run-tests-races --jobs "${JOBS:-1}" --program build/release/velatura "$pattern"
