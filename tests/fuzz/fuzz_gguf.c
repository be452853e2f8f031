/* fuzz_gguf.c: files of ggml's programs on hostile bytes; every value of what is accepted is
 * decoded.
 */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_tensors.h"

static const char *const examples[] = {"types.gguf", "odd.gguf"};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    return fuzz_golden("gguf", examples, VEL_COUNT(examples), i, n);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    return fuzz_tensors(bytes, n);
}
