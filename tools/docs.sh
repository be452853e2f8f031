#!/usr/bin/env bash
# docs.sh: what the pages name is there: each pitfall's test (or the file that a comment in it guards),
# and each page and picture that is linked to.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=$(sed -nE 's/^TEST\(([a-z0-9_]+)\).*/\1/p' tests/*.c)
wrong=0

tell() {
    echo "$1"
    wrong=1
}

# The last cell of each row of a table, behind its line's number; not of its first two rows.
cells() {
    awk '/^\|/ { if (++row > 2) { n = split($0, cell, / \| */); print NR, cell[n] == "" ? cell[n - 1] : cell[n] } }
         !/^\|/ { row = 0 }' docs/pitfalls.md
}

while read -r line cell; do
    names=$(grep -oE '`[^`]+`' <<<"$cell" | tr -d '`') || tell "docs/pitfalls.md:$line: names no test"
    while read -r name; do
        if [[ $name == */* ]]; then
            [ -e "$name" ] || tell "docs/pitfalls.md:$line: no file $name"
        else
            grep -qxE "${name//\*/.*}" <<<"$tests" || tell "docs/pitfalls.md:$line: no test $name"
        fi
    done <<<"$names"
done < <(cells)

for page in README.md docs/*.md; do
    while read -r link; do
        case $link in '' | http* | '#'*) continue ;; esac
        [ -e "$(dirname "$page")/${link%%#*}" ] || tell "$page: no $link"
    done < <(grep -oE '\]\([^)]+\)' "$page" | sed -E 's/^\]\(|\)$//g')
done
exit $wrong
