/* fuzz_safetensors.c: vel_safetensors_open on hostile bytes; every tensor of what is accepted is
 * read from its first to its last element. */
#define _GNU_SOURCE /* memfd_create */
#include "fuzz_tensors.h"

/* Header, then `data` bytes of zeros. */
static const struct {
    const char *header;
    size_t data;
} examples[] = {
    {"{}", 0},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}}", 24},
    {"{\"__metadata__\":{\"format\":\"pt\"},"
     "\"b.weight\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,8]},"
     "\"c\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[8,10]},"
     "\"d\":{\"dtype\":\"U8\",\"shape\":[0,7],\"data_offsets\":[10,10]}}",
     10},
    {"{\"i\":{\"dtype\":\"I64\",\"shape\":[1,1,1,2],\"data_offsets\":[0,16]},"
     "\"e\":{\"dtype\":\"F8_E4M3\",\"shape\":[3],\"data_offsets\":[16,19]},"
     "\"f\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[19,20]}}   ",
     20},
};

const uint8_t *fuzz_seed(int i, size_t *n)
{
    static uint8_t file[1024];
    if (i >= VEL_COUNT(examples))
        return NULL;
    size_t head = strlen(examples[i].header);
    memset(file, 0, sizeof file);
    for (int k = 0; k < 8; k++)
        file[k] = (uint8_t)((uint64_t)head >> 8 * k);
    memcpy(file + 8, examples[i].header, head);
    *n = 8 + head + examples[i].data;
    return file;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    return fuzz_tensors(bytes, n);
}
