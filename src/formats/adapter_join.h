/* adapter_join.h: modules of an adapter as the family's original files have them: several of ours
 * are the rows of one of theirs (q, k and v), and some rows lie in another order. Private to the
 * reader and the writer of adapter files. */
#ifndef VEL_FORMATS_ADAPTER_JOIN_H
#define VEL_FORMATS_ADAPTER_JOIN_H

#include "formats/adapter_file.h"

/* What becomes of the tensors of a module that is theirs: only the rows of known->first_row and on
 * are kept, and only the columns that these use; halves are exchanged. In place. VEL_UNSUPPORTED
 * where the kind does not allow it. file: for messages. */
vel_status vel_adapter_cut(vel_ctx *ctx, const char *file, const vel_known_module *known,
                           bool joined, vel_adapter_module *m);

/* The other way: n modules that are rows of one of theirs, as one module (or one whose halves are
 * exchanged), with tensors in the arena. Missing neighbours are not changed: zeros. *done false:
 * the kinds of these modules cannot be stated as one. */
typedef struct vel_adapter_piece {
    const vel_known_module *known;
    const vel_adapter_module *module;
} vel_adapter_piece;
vel_status vel_adapter_join(vel_ctx *ctx, vel_arena *a, const vel_adapter_piece *pieces, int n,
                            vel_adapter_module *out, bool *done);

#endif
