/* config.h: files of flags. */
#ifndef VEL_DIALECT_CONFIG_H
#define VEL_DIALECT_CONFIG_H

#include "dialects/dialects.h"

/* Flags of --config_file that the line does not give. */
vel_status vel_config_read(vel_line *l);
/* Writes the line's flags to --config_file. */
vel_status vel_config_write(vel_line *l);

#endif
