/* bpe_unicode.c: what the reference tokenizer thinks of a code point.
 *
 * The tokenizers crate (0.23) mixes three ages of Unicode: its regular expressions know 16.0, its
 * lower case 17.0, its NFC 9.0. utf8proc has one age, that of the installed library (2.7 has 14.0,
 * 2.8 has 15.0, 2.11 has 17.0). So utf8proc answers for what has not changed since 14.0 (NFC: 9.0),
 * and the tables below for the rest; the answer is then the same with any utf8proc from 2.7 on.
 * PCRE2 is not used: its own Unicode (14.0 in 10.42) and its \s, which takes U+180E, would need a
 * second set of exceptions, and CLIP's pattern needs no more than these classes.
 *
 * The rows are printed by `tools/golden/tokenizer.py --tables`, from the reference, Python's
 * unicodedata (14.0) and the regex module (17.0). */
#include "tokenizers/bpe.h"

#include <utf8proc.h>

typedef struct code_range {
    int32_t first, last;
    int32_t value;
} code_range;

/* White space as in \s of the reference: White_Space of any Unicode since 6.3. */
static const code_range spaces[] = {
    {0x9, 0xd},       {0x20, 0x20},     {0x85, 0x85},     {0xa0, 0xa0},     {0x1680, 0x1680},
    {0x2000, 0x200a}, {0x2028, 0x2029}, {0x202f, 0x202f}, {0x205f, 0x205f}, {0x3000, 0x3000},
};

/* Code points whose class in Unicode 14 to 17 is not everywhere that of the reference. */
static const code_range classes[] = {
    {0x558, 0x558, BPE_OTHER},      {0x58b, 0x58c, BPE_OTHER},      {0x88f, 0x88f, BPE_OTHER},
    {0xc5c, 0xc5c, BPE_OTHER},      {0xcdc, 0xcdc, BPE_OTHER},      {0x1c89, 0x1c8a, BPE_LETTER},
    {0x208f, 0x208f, BPE_OTHER},    {0x209d, 0x209f, BPE_OTHER},    {0xa7cb, 0xa7cd, BPE_LETTER},
    {0xa7ce, 0xa7cf, BPE_OTHER},    {0xa7d2, 0xa7d2, BPE_OTHER},    {0xa7d4, 0xa7d4, BPE_OTHER},
    {0xa7da, 0xa7dc, BPE_LETTER},   {0xa7dd, 0xa7f1, BPE_OTHER},    {0xab6c, 0xab6d, BPE_OTHER},
    {0x105c0, 0x105f3, BPE_LETTER}, {0x107bb, 0x107bf, BPE_OTHER},  {0x10940, 0x10959, BPE_OTHER},
    {0x10d40, 0x10d49, BPE_NUMBER}, {0x10d4a, 0x10d65, BPE_LETTER}, {0x10d6f, 0x10d85, BPE_LETTER},
    {0x10ec2, 0x10ec4, BPE_LETTER}, {0x10ec5, 0x10eee, BPE_OTHER},  {0x1123f, 0x11240, BPE_LETTER},
    {0x11380, 0x11389, BPE_LETTER}, {0x1138b, 0x1138b, BPE_LETTER}, {0x1138e, 0x1138e, BPE_LETTER},
    {0x11390, 0x113b5, BPE_LETTER}, {0x113b7, 0x113b7, BPE_LETTER}, {0x113d1, 0x113d1, BPE_LETTER},
    {0x113d3, 0x113d3, BPE_LETTER}, {0x116d0, 0x116e3, BPE_NUMBER}, {0x11b0a, 0x11b0a, BPE_OTHER},
    {0x11bc0, 0x11be0, BPE_LETTER}, {0x11bf0, 0x11bf9, BPE_NUMBER}, {0x11db0, 0x11df1, BPE_OTHER},
    {0x11f02, 0x11f02, BPE_LETTER}, {0x11f04, 0x11f10, BPE_LETTER}, {0x11f12, 0x11f33, BPE_LETTER},
    {0x11f50, 0x11f59, BPE_NUMBER}, {0x1246f, 0x1247f, BPE_OTHER},  {0x12550, 0x12686, BPE_OTHER},
    {0x1342f, 0x1342f, BPE_LETTER}, {0x13441, 0x13446, BPE_LETTER}, {0x13460, 0x143fa, BPE_LETTER},
    {0x16100, 0x1611d, BPE_LETTER}, {0x16130, 0x16139, BPE_NUMBER}, {0x16d40, 0x16d6c, BPE_LETTER},
    {0x16d70, 0x16d79, BPE_NUMBER}, {0x16ea0, 0x16ed3, BPE_OTHER},  {0x16ff2, 0x16ff6, BPE_OTHER},
    {0x187f8, 0x187ff, BPE_OTHER},  {0x18cd6, 0x18cda, BPE_OTHER},  {0x18cff, 0x18cff, BPE_LETTER},
    {0x18d09, 0x191d2, BPE_OTHER},  {0x1b123, 0x1b128, BPE_OTHER},  {0x1b132, 0x1b132, BPE_LETTER},
    {0x1b155, 0x1b155, BPE_LETTER}, {0x1b168, 0x1b168, BPE_OTHER},  {0x1ccf0, 0x1ccf9, BPE_NUMBER},
    {0x1d2c0, 0x1d2d3, BPE_NUMBER}, {0x1d6a6, 0x1d6a6, BPE_OTHER},  {0x1df1f, 0x1df24, BPE_OTHER},
    {0x1df25, 0x1df2a, BPE_LETTER}, {0x1df2b, 0x1dfff, BPE_OTHER},  {0x1e030, 0x1e06d, BPE_LETTER},
    {0x1e4d0, 0x1e4eb, BPE_LETTER}, {0x1e4f0, 0x1e4f9, BPE_NUMBER}, {0x1e5d0, 0x1e5ed, BPE_LETTER},
    {0x1e5f0, 0x1e5f0, BPE_LETTER}, {0x1e5f1, 0x1e5fa, BPE_NUMBER}, {0x1e6c0, 0x1e6ff, BPE_OTHER},
    {0x2b739, 0x2b739, BPE_LETTER}, {0x2b73a, 0x2b73f, BPE_OTHER},  {0x2b81e, 0x2b81e, BPE_OTHER},
    {0x2cea2, 0x2cead, BPE_OTHER},  {0x2ebf0, 0x2ee5d, BPE_LETTER}, {0x31350, 0x323af, BPE_LETTER},
    {0x323b0, 0x3fc3f, BPE_OTHER},
};

/* Lower case newer than Unicode 14: the value is what is added. */
static const code_range lowers[] = {
    {0x1c89, 0x1c89, 1},      {0xa7cb, 0xa7cb, 0x264 - 0xa7cb},
    {0xa7cc, 0xa7cc, 1},      {0xa7ce, 0xa7ce, 1},
    {0xa7d2, 0xa7d2, 1},      {0xa7d4, 0xa7d4, 1},
    {0xa7da, 0xa7da, 1},      {0xa7dc, 0xa7dc, 0x19b - 0xa7dc},
    {0x10d50, 0x10d65, 0x20}, {0x16ea0, 0x16eb8, 0x1b},
};

/* Code points that NFC orders or composes since a Unicode newer than 9.0. */
static const code_range unknown_marks[] = {
    {0x5c8, 0x5c9},     {0x7fd, 0x7fd},     {0x897, 0x89f},     {0x8ca, 0x8d3},
    {0x9fe, 0x9fe},     {0xc3c, 0xc3c},     {0xd3b, 0xd3c},     {0xeba, 0xeba},
    {0x1715, 0x1715},   {0x1abf, 0x1af0},   {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},
    {0x105c9, 0x105c9}, {0x105d2, 0x105d2}, {0x105da, 0x105da}, {0x105e4, 0x105e4},
    {0x10d24, 0x10d27}, {0x10d69, 0x10d6d}, {0x10eab, 0x10eac}, {0x10ecb, 0x10ecf},
    {0x10ef0, 0x10efb}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85},
    {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x11382, 0x11391}, {0x113b8, 0x113c9},
    {0x113ce, 0x113d0}, {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11930, 0x11938},
    {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0}, {0x11a34, 0x11a34},
    {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x1611e, 0x16129}, {0x1612f, 0x1612f},
    {0x16d63, 0x16d6a}, {0x16ff0, 0x16ff1}, {0x1d127, 0x1d128}, {0x1d250, 0x1d252},
    {0x1d25b, 0x1d25c}, {0x1d25f, 0x1d25f}, {0x1d280, 0x1d281}, {0x1e08f, 0x1e08f},
    {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef},
    {0x1e5ee, 0x1e5ef}, {0x1e6e3, 0x1e6e3}, {0x1e6e6, 0x1e6e6}, {0x1e6ee, 0x1e6ef},
    {0x1e6f5, 0x1e6f5},
};

/* Code points with a compatible decomposition since a Unicode newer than 9.0. */
static const code_range unknown_compatible[] = {
    {0x32ff, 0x32ff},   {0xa7f1, 0xa7f4},   {0xab69, 0xab69},   {0x10781, 0x107ba},
    {0x1ccd6, 0x1ccf9}, {0x1e030, 0x1e06d}, {0x1f16c, 0x1f16c}, {0x1fbf0, 0x1fbf9},
};

/* The row of a sorted table that holds c; NULL when none does. */
static const code_range *find_range(const code_range *rows, int n, int32_t c)
{
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (c > rows[middle].last)
            low = middle + 1;
        else
            high = middle;
    }
    return low < n && c >= rows[low].first ? &rows[low] : NULL;
}

bpe_class vel_bpe_class(int32_t c)
{
    if (find_range(spaces, VEL_COUNT(spaces), c))
        return BPE_SPACE;
    const code_range *exception = find_range(classes, VEL_COUNT(classes), c);
    if (exception)
        return (bpe_class)exception->value;
    switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return BPE_LETTER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return BPE_NUMBER;
    default:
        return BPE_OTHER;
    }
}

int32_t vel_bpe_lower(int32_t c)
{
    if (c < 0x80)
        return c >= 'A' && c <= 'Z' ? c + 0x20 : c;
    if (c == 0x130) /* the only one with two: i and a combining dot */
        return 'i';
    const code_range *row = find_range(lowers, VEL_COUNT(lowers), c);
    return row ? c + row->value : utf8proc_tolower(c);
}

bool vel_bpe_unknown_mark(int32_t c)
{
    return find_range(unknown_marks, VEL_COUNT(unknown_marks), c);
}

bool vel_bpe_unknown_compatible(int32_t c)
{
    return find_range(unknown_compatible, VEL_COUNT(unknown_compatible), c);
}
