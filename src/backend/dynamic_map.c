/* dynamic_map.c: the 256 values of 8-bit optimizer states, which every backend shares. */
#include <stdlib.h>

#include "backend/backend.h"

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Decade i (10^(i-7) to 10^(i-6)) is cut into 2^i pieces of equal width when signed, twice as many
 * otherwise; the values are their middles. With them come 0 and 1, and no -1. */
void vel_dynamic_map(bool is_signed, float out[256])
{
    int n = 0;
    for (int i = 0; i < 7; i++) {
        int pieces = is_signed ? 1 << i : 2 << i;
        for (int k = 0; k < pieces; k++) {
            float middle = (float)((0.1 + 0.9 * (k + 0.5) / pieces) * pow(10, i - 6));
            out[n++] = middle;
            if (is_signed)
                out[n++] = -middle;
        }
    }
    out[n++] = 0;
    out[n++] = 1;
    VEL_ASSERT(n == 256);
    qsort(out, 256, sizeof *out, by_value);
}
