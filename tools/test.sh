#!/usr/bin/env bash
# test.sh: the whole test suite, as ./bootstrap test runs it: 13 minutes on two cores with CUDA's
# sources, of which the hostile tests take 4 and a half. Tests, parsers and files to compile are shared by JOBS
# processes (as many as there are cores). Each part prints its own count; the last lines say what failed
# and the sum: "N passed, N failed".
#
#   build, layers,    the program, what each folder may touch, how long files are, and that the tests
#   sizes, docs       and pages that docs name exist
#   tests             all of them, and the reference values of the embedded model
#   hostile           once more under AddressSanitizer and UBSan, in a build that poisons freed memory,
#                     spoils every output before it is written and recomputes at random. Left out there:
#                     what draws whole pictures and what waits for a program to be killed, which are slow
#   failing memory    once more with two of each test's allocations failing (make fault takes more of
#                     them), without those of whole runs
#   fuzz              parsers on mutated files, for a few seconds each
#   oneDNN 3          all tests again with a oneDNN 3.x, where pip can download one
#   aarch64           objects for it, where the cross compiler is installed
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
passed=0
failed=0
why=$(mktemp) # what the parts that failed said of it, for the end
trap 'rm -f "$why"' EXIT
jobs=${JOBS:-$(nproc)}
export OMP_WAIT_POLICY=passive # tests start many short runs; spinning threads would wait for each other

# part NAME COMMAND...: runs it, shows its output when it fails, and adds up its last line of
# counts (a command without one counts as one test).
part() {
    local name=$1 log counts status
    shift
    log=$(mktemp)
    local start=$SECONDS
    "$@" >"$log" 2>&1
    status=$?
    counts=$(grep -oE '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
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
        tail -n 25 "$log"
        {
            echo "--- $name:"
            grep -E 'FAIL|failed|[Ee]rror|ERROR|Sanitizer|status|^ +#[0-9]+ .* (src|tests)/' "$log" | cut -c 1-200 | head -n 40
        } >>"$why"
    fi
    rm -f "$log"
}

skipped() {
    printf '%-44s skipped: %s\n' "$1" "$2"
}

hostile=("SAN=address,undefined" HOSTILE=1)
hostile_build=build/san-address-undefined-hostile
slow='pipeline_*,train_survives*,train_sigint*,train_loss_falls,train_draws*,train_keeps*'

part "build" make -s -j"$jobs" build/release/velatura build/release/run-tests build/release/libvelatura.so
part "layers" tools/layers.sh
part "sizes" tools/size.sh
part "docs" tools/docs.sh
part "tests" make -s test
part "reference values of emoji-sd" build/release/velatura check-golden --model models/emoji-sd tests/golden/emoji-sd
part "hostile build" make -s -j"$jobs" "${hostile[@]}" $hostile_build/velatura $hostile_build/run-tests \
    $hostile_build/libvelatura.so
part "hostile tests" make -s "${hostile[@]}" SKIP="$slow" test
part "failing memory" make -s fault MOST=2 \
    SKIP="$slow,train_resumed*,train_settings*,seed_*,methods_class*,compare_*"
part "fuzz" tools/fuzz.sh --plain 5
if tools/onednn3.sh; then
    part "oneDNN 3: build" make -s -j"$jobs" ONEDNN=build/onednn3 build/release-onednn/velatura \
        build/release-onednn/run-tests build/release-onednn/libvelatura.so
    part "oneDNN 3: tests" make -s ONEDNN=build/onednn3 test
else
    skipped "oneDNN 3" "no pip or no network here"
fi
if command -v aarch64-linux-gnu-gcc >/dev/null; then
    part "aarch64 compiles" tools/aarch64.sh
else
    skipped "aarch64" "aarch64-linux-gnu-gcc is not installed"
fi
if command -v nvcc >/dev/null && [ -d src/backend/cuda ]; then
    part "CUDA sources compile" make -s -j"$jobs" cuda
fi
cat "$why"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
