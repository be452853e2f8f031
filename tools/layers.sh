#!/usr/bin/env bash
# layers.sh: what a line may touch. The table holds every edge between folders that is allowed: a folder
# and the headers of others that it may include (its own are always allowed). Any other edge, a vendor's
# header outside its folder, or a call that a layer must not make, is printed and fails.
set -euo pipefail
cd "$(dirname "$0")/.."

# folder              headers of other folders ("*": any)
layers='
src/base              velatura.h
src/graph             base/base.h
src/ops               graph/graph.h base/base.h base/quantise.h
src/passes            ops/ops.h graph/graph.h base/base.h base/quantise.h
src/backend           graph/graph.h base/base.h
src/backend/null      backend/backend.h graph/graph.h base/base.h
src/backend/cpu       backend/backend.h graph/graph.h base/base.h
src/backend/cpu/isa   backend/cpu/isa.h backend/cpu/kernels.h backend/cpu/tiles.h backend/backend.h graph/graph.h base/base.h base/quantise.h
src/backend/cuda      backend/backend.h graph/graph.h base/base.h base/quantise.h
src/exec              passes/passes.h ops/ops.h backend/backend.h graph/graph.h base/base.h base/quantise.h
src/formats           base/base.h
src/tokenizers        formats/formats.h base/base.h
src/models            formats/formats.h graph/graph.h base/base.h
src/adapters          graph/graph.h formats/adapter_leaves.h base/base.h
src/data              formats/formats.h tokenizers/tokenizers.h base/base.h
src/sample            exec/exec.h models/models.h models/checkpoint.h adapters/adapters.h formats/formats.h formats/adapter_file.h tokenizers/tokenizers.h base/base.h
src/train             sample/sample.h exec/exec.h models/models.h adapters/adapters.h data/data.h formats/formats.h formats/adapter_file.h tokenizers/tokenizers.h base/base.h
src/dialects          formats/formats.h base/base.h
src                   *
cli                   velatura.h
serve                 velatura.h
examples              velatura.h
'

# header (regular expression)        folders that may include it
vendors='
(oneapi/)?dnnl|oneapi/              src/backend/cpu
cuda|cublas|cudnn|nccl              src/backend/cuda
vips/|gio/                          src/formats
glib                                src/formats src/base
jansson                             src/formats
pcre2                               src/formats
utf8proc                            src/tokenizers
'

failed=0
complain() {
    printf '%s\n' "$1"
    failed=1
}

row_of() { # folder -> its row of the table
    awk -v folder="$1" '$1 == folder { $1 = ""; print; found = 1 } END { exit !found }' <<<"$layers"
}

check_edges() { # file
    local file=$1 folder allowed line header
    folder=$(dirname "$file")
    if ! allowed=$(row_of "$folder"); then
        complain "$file: the folder $folder has no row in tools/layers.sh"
        return
    fi
    [ "$allowed" = " *" ] && return
    while IFS=: read -r line header; do
        header=$(sed -E 's/.*"([^"]*)".*/\1/' <<<"$header")
        # its own: beside it, or by its path from src
        [ -f "$folder/$header" ] && [[ $header != */* ]] && continue
        [ "src/$(dirname "$header")" = "$folder" ] && continue
        [ "$header" = graph/ops.def ] && header=graph/graph.h # the graph's vocabulary
        [[ " $allowed " == *" $header "* ]] || complain "$file:$line: $folder must not include \"$header\""
    done < <(grep -nE '^ *# *include *"' "$file" || true)
}

check_vendors() { # file
    local file=$1 pattern folders line folder
    folder=$(dirname "$file")
    while read -r pattern folders; do
        [ -n "$pattern" ] || continue
        while IFS=: read -r line _; do
            for f in $folders; do
                [[ $folder == "$f" || $folder == "$f"/* ]] && continue 2
            done
            complain "$file:$line: only $folders may include this header"
        done < <(grep -nE "^ *# *include *<($pattern)" "$file" || true)
    done <<<"$vendors"
}

check_words() { # what, extended regular expression, folders or files ...
    local what=$1 pattern=$2 hits
    shift 2
    # comments are no calls
    hits=$(grep -rnE --include='*.c' --include='*.h' "$pattern" "$@" 2>/dev/null | grep -vE '^[^:]*:[0-9]*: *(/?\*|//)' || true)
    [ -z "$hits" ] || complain "$what:"$'\n'"$hits"
}

folders=()
for folder in src cli serve examples; do
    [ -d $folder ] && folders+=($folder)
done
files=$(find "${folders[@]}" -name '*.[ch]' | sort)
for file in $files; do
    check_edges "$file"
    check_vendors "$file"
done

b='(^|[^A-Za-z0-9_])' # where a word begins
check_words 'these layers allocate, print and open nothing' \
    "$b(malloc|calloc|realloc|free|printf|fprintf|puts|fopen|open)\(|${b}FILE *\*" src/ops src/models src/adapters src/passes
check_words 'the library never prints or exits' "$b(printf|puts|perror|exit|_exit|abort)\(|${b}(stdout|stderr)[^A-Za-z0-9_]" \
    $(find src -name '*.c' ! -path src/base/ctx.c)
check_words 'only base/ctx.c asks the system for memory' "$b(malloc|calloc|realloc)\(" $(find src -name '*.c' ! -path src/base/ctx.c)
check_words 'these layers keep no variables' \
    '^static (struct |unsigned )?(bool|char|int|int64_t|double|float|vel_[a-z_]+|void) *\*?[a-z_]+(\[.*\])?( = .*)?;' \
    src/graph src/ops src/passes src/models src/adapters

double=$(find "${folders[@]}" -name '*.[ch]' -printf '%f\n' | sort | uniq -d)
[ -z "$double" ] || complain "file names are unique in the tree; these are not: $double"

[ "$failed" = 0 ] && echo "layers: $(wc -w <<<"$files") files, no edge that is not allowed"
exit $failed
