#!/usr/bin/env bash
# test.sh: the whole test suite, as ./bootstrap test runs it. Each part prints its own count; the last
# line is the sum: "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."
passed=0
failed=0

# part NAME COMMAND...: runs it, shows its output when it fails, and adds up its last line's counts
# (a command without such a line counts as one test).
part() {
    local name=$1 log counts status
    shift
    log=$(mktemp)
    local start=$SECONDS
    "$@" >"$log" 2>&1
    status=$?
    counts=$(tail -n 1 "$log" | grep -oE '^[0-9]+ passed, [0-9]+ failed' || true)
    local p=0 f=0
    if [ -n "$counts" ]; then
        p=${counts%% passed*}
        f=$(sed -E 's/.*, ([0-9]+) failed/\1/' <<<"$counts")
        [ $status -ne 0 ] && [ "$f" = 0 ] && f=1
    elif [ $status -eq 0 ]; then p=1; else f=1; fi
    passed=$((passed + p))
    failed=$((failed + f))
    printf '%-44s %5d passed %4d failed %5d s\n' "$name" "$p" "$f" $((SECONDS - start))
    if [ "$f" != 0 ]; then
        grep -E 'FAIL|failed|error|ERROR|Sanitizer' "$log" | head -n 40
        echo "--- end of the output:"
        tail -n 25 "$log"
    fi
    rm -f "$log"
}

jobs=$(nproc)
part "build" make -s -j"$jobs" build/release/velatura build/release/run-tests
part "layers" tools/layers.sh
part "tests" make -s test
part "reference values of emoji-sd" build/release/velatura check-golden --model models/emoji-sd tests/golden/emoji-sd
part "build with sanitizers" make -s -j"$jobs" SAN=address,undefined build/san-address-undefined/run-tests
part "tests under sanitizers" env ASAN_OPTIONS=detect_leaks=1 tools/suppressed.sh build/san-address-undefined/run-tests --short
if command -v nvcc >/dev/null && [ -d src/backend/cuda ]; then
    part "CUDA sources compile" make -s cuda
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
