/* fuzz_pickle.c: files of torch.save on hostile bytes, as archives and in the older form; every
 * tensor of what is accepted is read from its first to its last element. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_tensors.h"

static const char *const examples[] = {"zip.pt", "zip4.pt", "legacy.pt", "model.ckpt"};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    return fuzz_golden("pickle", examples, VEL_COUNT(examples), i, n);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    return fuzz_tensors(bytes, n);
}
