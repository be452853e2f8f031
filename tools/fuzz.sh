#!/usr/bin/env bash
# fuzz.sh: each parser on hostile bytes (tests/fuzz/fuzz_*.c), for some seconds each.
#
#   tools/fuzz.sh [SECONDS]           with clang's libFuzzer where there is one, else as with --plain
#   tools/fuzz.sh --plain [SECONDS]   mutants of the seeds by tests/fuzz/fuzz_main.c, the same every time
#
# The last line is "N passed, N failed"; an input that fails is left in build/fuzz.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
plain=0
if [ "${1:-}" = --plain ]; then
    plain=1
    shift
fi
seconds=${1:-10}
out=build/fuzz
lib=build/san-address-undefined-hostile/libvelatura.a
mkdir -p "$out"
read -r -a flags < <(pkg-config --cflags vips jansson libpcre2-8 libutf8proc | tr '\n' ' ')
read -r -a libs < <(pkg-config --libs vips jansson libpcre2-8 libutf8proc | tr '\n' ' ')
flags+=(-std=gnu11 -g -O1 -Iinclude -Isrc)
export ASAN_OPTIONS=detect_leaks=0 # the targets count their own context's memory

has_libfuzzer() {
    echo 'int LLVMFuzzerTestOneInput(const char *b, unsigned long n) { return b && n > 1ul << 40; }' |
        clang -fsanitize=fuzzer,address -x c - -o "$out/probe" 2>/dev/null
}

# Objects of what the targets use, and of nothing else.
build_with_clang() {
    local source
    for source in src/base/*.c src/formats/*.c src/tokenizers/*.c src/data/*.c src/models/*.c src/graph/*.c src/ops/*.c src/passes/*.c; do
        local object=$out/${source//\//-}.o
        [ "$object" -nt "$source" ] || clang "${flags[@]}" -fsanitize=fuzzer-no-link,address,undefined -c "$source" -o "$object" || return 1
    done
}

build_target() {
    if [ $plain = 1 ]; then
        ${CC:-cc} "${flags[@]}" -fopenmp -fsanitize=address,undefined "$1" tests/fuzz/fuzz_main.c \
            "$lib" -o "$2" -ldnnl "${libs[@]}" -lm -ldl -lpthread
    else
        clang "${flags[@]}" -fsanitize=fuzzer,address,undefined "$1" "$out"/src-*.o -o "$2" "${libs[@]}" -lm
    fi
}

run_target() {
    if [ $plain = 1 ]; then
        # as many as fit: batches with other seeds
        local end=$((SECONDS + seconds)) seed=1
        while [ $SECONDS -lt $end ]; do
            (cd "$out" && "../../$1" -runs=2000 -seed=$seed) || return 1
            seed=$((seed + 1))
        done
    else
        mkdir -p "$1-corpus"
        "$1" -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=4096 -artifact_prefix="$1-" "$1-corpus"
    fi
}

has_libfuzzer || plain=1
if [ $plain = 1 ]; then
    make -s -j2 SAN=address,undefined HOSTILE=1 "$lib" || exit 1
else
    build_with_clang || exit 1
fi
try_target() { # source name: builds and runs it; leaves what is said of it in $out/name.said
    if build_target "$1" "$out/$2" && run_target "$out/$2" >"$out/$2.log" 2>&1; then
        echo "$2: $(grep -E 'stat::number_of_executed_units|^Done|mutants' "$out/$2.log" | tail -n 1)"
    else
        echo "$2: FAIL"
        tail -n 30 "$out/$2.log"
        touch "$out/$2.failed"
    fi
} >"$out/$2.said" 2>&1

rm -f "$out"/*.failed "$out"/*.said "$out"/*.log
count=0
for source in tests/fuzz/fuzz_*.c; do
    name=$(basename "$source" .c)
    [ "$name" = fuzz_main ] && continue
    count=$((count + 1))
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    try_target "$source" "$name" &
done
wait
cat "$out"/*.said
failed=$(find "$out" -name '*.failed' | wc -l)
passed=$((count - failed))
echo "$passed passed, $failed failed"
[ $failed = 0 ]
