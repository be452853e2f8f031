#!/usr/bin/env bash
# onednn3.sh: a oneDNN 3.x to build and test against where the system has 2.x, from PyPI's wheels (the
# product needs no Python; this uses pip as a downloader).
#
#   tools/onednn3.sh [FOLDER]      default build/onednn3; then: make ONEDNN=build/onednn3 test
#
# Does nothing when the folder is already there; exits with 3 when pip or the network is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/onednn3}
version=2023.2.0 # oneDNN 3.2

[ -e "$folder/lib/libdnnl.so" ] && exit 0
pip=$(command -v pip3 || command -v pip || true)
if [ -z "$pip" ]; then
    echo "onednn3: no pip here" >&2
    exit 3
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! timeout 120 "$pip" download -q --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" \
    "onednn-cpu-gomp==$version" "onednn-devel-cpu-gomp==$version" >"$work/log" 2>&1; then
    echo "onednn3: the wheels could not be downloaded: $(tail -n 1 "$work/log")" >&2
    exit 3
fi
for wheel in "$work"/*.whl; do
    if command -v unzip >/dev/null; then
        unzip -q -o "$wheel" -d "$work/unpacked"
    else
        python3 -m zipfile -e "$wheel" "$work/unpacked"
    fi
done
mkdir -p "$folder/lib"
for part in "$work"/unpacked/*.data/data; do
    [ -d "$part/include" ] && cp -r "$part/include" "$folder/"
    [ -e "$part/lib/libdnnl.so" ] && cp "$part/lib/libdnnl.so" "$folder/lib/libdnnl.so.3.2"
done
ln -sf libdnnl.so.3.2 "$folder/lib/libdnnl.so.3" # a wheel holds copies instead of links
ln -sf libdnnl.so.3 "$folder/lib/libdnnl.so"
