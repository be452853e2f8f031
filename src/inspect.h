/* inspect.h: shared by the parts of `velatura inspect`; private to src/. */
#ifndef VEL_INSPECT_H
#define VEL_INSPECT_H

#include "params.h"

/* Is it an adapter by the names of its tensors? */
bool vel_inspect_is_adapter(const vel_safetensors *sf);
vel_status vel_inspect_adapter(vel_ctx *ctx, const vel_safetensors *sf, vel_text *out);
/* The types that tensors are stored in, as "F16" or "F16, F32"; adds up values and bytes. */
void vel_inspect_sum(const vel_safetensors *sf, vel_text *types, int64_t *values, int64_t *bytes);
void vel_inspect_metadata(const vel_safetensors *sf, vel_text *out);

#endif
