/* png_text.h: text entries of PNG files in memory; private to formats/. */
#ifndef VEL_PNG_TEXT_H
#define VEL_PNG_TEXT_H

#include "base/base.h"

/* Appends the PNG to out, with n pairs (key, value) after its header chunk. */
vel_status vel_png_add_text(vel_text *out, const void *png, size_t size, const char *const *pairs,
                            int n);

#endif
