/* gguf.h: files of ggml's programs, for the reader of tensor files. Private to src/formats. */
#ifndef VEL_FORMATS_GGUF_H
#define VEL_FORMATS_GGUF_H

#include "formats/formats.h"

bool vel_gguf_sniff(const uint8_t *bytes, size_t n);
typedef vel_status (*vel_gguf_add)(void *user, const vel_file_tensor *t);
/* Hands over every tensor: names in the arena, data inside bytes. Facts that are texts go into
 * metadata. */
vel_status vel_gguf_read(vel_ctx *ctx, vel_arena *arena, const char *path, const uint8_t *bytes,
                         size_t n, vel_gguf_add add, void *user, json_t *metadata);
/* The size of a block of values; false for types that have none. */
bool vel_gguf_block(vel_file_type type, vel_file_block_size *out);
/* Values first .. first + n - 1 of blocks that begin at data. */
void vel_gguf_floats(vel_file_type type, const uint8_t *data, int64_t first, int64_t n, float *out);

#endif
