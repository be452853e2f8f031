/* adapter_config.h: PEFT's config of an adapter, as it stands in adapter_config.json and in the
 * metadata of diffusers' files. Private to the writer of adapter files. */
#ifndef VEL_FORMATS_ADAPTER_CONFIG_H
#define VEL_FORMATS_ADAPTER_CONFIG_H

#include "formats/adapter_file.h"

/* Are two paths in the same part: "unet", "text_encoder"? */
bool vel_adapter_same_part(const char *a, const char *b);
/* Adds the config of the modules in the same part as path. folded: for diffusers, whose keys begin
 * with the part ("unet.r") and where the strength is in the tensors already. VEL_UNSUPPORTED, with
 * the module, for what PEFT cannot state. */
vel_status vel_adapter_peft_config(const vel_adapter_file *f, const char *path, bool folded,
                                   json_t *config);

#endif
