/* fuzz.h: what a fuzz target gives: libFuzzer's entry, and seeds of its own for fuzz_main.c. A
 * target must come back from every input, leave no memory of its context, and be a function of the
 * input. */
#ifndef VEL_FUZZ_H
#define VEL_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);
/* The i-th seed of its own; NULL past the last. A target may leave it out. */
const uint8_t *fuzz_seed(int i, size_t *n) __attribute__((weak));

#endif
