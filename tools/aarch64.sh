#!/usr/bin/env bash
# aarch64.sh: compiles every source for 64-bit ARM with a cross compiler (Debian: gcc-aarch64-linux-gnu),
# to objects in build/aarch64. The libraries' headers are this machine's: they are the same there, but for
# glib's configuration, whose sizes are those of another 64-bit machine. Nothing is linked or run.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
cc=${CROSS_CC:-aarch64-linux-gnu-gcc}
out=build/aarch64
if ! command -v "$cc" >/dev/null; then
    echo "aarch64: no $cc here (Debian: apt-get install gcc-aarch64-linux-gnu)" >&2
    exit 3
fi
here=$(cc -dumpmachine)
# /usr/include itself would hide the cross compiler's own C library: only the libraries' headers are linked.
mkdir -p "$out/include"
for header in dnnl.h dnnl_config.h dnnl_types.h dnnl_version.h dnnl_debug.h oneapi jansson.h jansson_config.h \
    pcre2.h utf8proc.h vips expat.h expat_config.h; do
    for place in /usr/include "/usr/include/$here"; do
        [ -e "$place/$header" ] && ln -sfn "$place/$header" "$out/include/$header"
    done
done
read -r -a packages < <(pkg-config --cflags vips jansson libpcre2-8 libutf8proc | tr ' ' '\n' |
    grep -vx -e "-I/usr/include" -e "-I/usr/include/$here" | tr '\n' ' ')
flags=(-std=gnu11 -O1 -DNDEBUG -DVEL_ISA=base -fopenmp -fPIC -Wall -Wextra -Wno-missing-field-initializers
    -Wno-sign-compare -Iinclude -Isrc -isystem "$out/include" "${packages[@]}")
compile() { # several at a time: each file's flags are the script's arguments
    local source=$1 cc=$2 out=$3
    shift 3
    "$cc" "$@" -c "$source" -o "$out/${source//\//-}.o" || echo "$source" >>"$out/failed"
}
export -f compile
rm -f "$out/failed"
mapfile -t sources < <(find src cli tests -name '*.c' -not -path 'src/backend/cuda/*' | sort)
count=${#sources[@]}
printf '%s\n' "${sources[@]}" |
    xargs -P "$(nproc)" -I {} bash -c 'compile "$@"' compile {} "$cc" "$out" "${flags[@]}"
failed=0
[ -e "$out/failed" ] && failed=$(wc -l <"$out/failed")
[ "$failed" = 0 ] || cat "$out/failed"
echo "$((count - failed)) passed, $failed failed"
[ "$failed" = 0 ]
